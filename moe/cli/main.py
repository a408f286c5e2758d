"""`moe VERB key=value …` (or `python -m moe …`; under torchrun: `torchrun … -m moe …`).

    moe train                                             a tiny Mixtral on text that every Python carries
    moe train model=small data=files data.path='*.txt'    your own text
    torchrun --nproc-per-node 8 -m moe train model=mixtral_8x7b parallel.expert=8 train.precision=bfloat16
    moe plan model=mixtral_8x7b hardware=h100_8x2 …       what that needs, before it is launched
    moe prepare data=files data.path=corpus.jsonl         token shards only
    moe generate checkpoint=RUN_DIR prompt='Once'         text from a checkpoint
    moe report RUN_DIR                                    one HTML page about a run
    moe bench peers                                       our training step beside transformers'

`moe VERB --help` tells the verb's keys. Exit codes: 0 done, 1 a fault in the program or the machine, 2 something to
change in the command, the configuration or the data (one line on stderr says what), 75 training hung (stderr says which
rank and where: guard.hang_seconds), 128 + N stopped by signal N (130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM; a training run
has saved its state). After 75 and 128 + N the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe.compose import ConfigError, choices, compose_dict, groups, load_config
from moe.config import Config, PlanConfig
from moe.errors import StartError, Stopped, for_user
from moe.parent import die_with_torchrun


def _train(words: list[str]) -> None:
    """Pre-train or go on with a run: composes configs/train.yaml, writes run_dir."""
    from moe.dist.topology import world_from_environment

    config: Config = load_config(words)
    _, world_size, _, node_size = world_from_environment()
    config.check_world(world_size, node_size)
    from moe.train.loop import train

    train(config)


def _plan(words: list[str]) -> None:
    """What a run would need before it is launched: memory, bytes on the links, time; every word of `moe train`."""
    from moe.plan.show import run_plan

    run_plan(load_config(words, "plan", PlanConfig))


def _prepare(words: list[str]) -> None:
    """Write the token shards that `moe train` with the same data and tokenizer keys would use."""
    config: Config = load_config(words)
    from moe.data.prepare import check_vocab, prepare

    corpus = prepare(config.data, config.tokenizer)
    check_vocab(corpus, config.model.vocab_size)
    print(corpus.describe())


def _generate(words: list[str]) -> None:
    """Continue a prompt, or every line of a file, from a checkpoint."""
    from moe.generate import GenerateConfig, quote_texts, run_generate

    config = load_config(quote_texts(words), "generate", GenerateConfig)
    from moe.data.tokenizer import load_saved
    from moe.dist.checkpoint import load_model, resolve

    folder = resolve(Path(config.checkpoint))
    run_generate(config, load_model(folder), load_saved(folder.parent.parent / "tokenizer"))


def _report(words: list[str]) -> None:
    """Write RUN_DIR/report.html: curves, balance, expert shares, a text coloured by expert. No network needed."""
    if len(words) != 1 or "=" in words[0]:
        raise ConfigError(f"moe report {' '.join(words)}: give one run directory, as in `moe report runs/tiny-stdlib`")
    from moe.report.page import write_report

    print(write_report(Path(words[0])))


def _bench(words: list[str]) -> None:
    """Measure: `peers` (a training step beside transformers'), `attention` (time per token against length)."""
    from moe.bench import run_bench

    run_bench(words)


VERBS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "plan": _plan,
    "prepare": _prepare,
    "generate": _generate,
    "report": _report,
    "bench": _bench,
}


def _schema(verb: str) -> tuple[str, type] | None:
    if verb in ("train", "prepare"):
        return "train", Config
    if verb == "plan":
        return "plan", PlanConfig
    if verb == "generate":
        from moe.generate import GenerateConfig

        return "generate", GenerateConfig
    return None


def _help(verb: str) -> str:
    from omegaconf import OmegaConf

    text = [f"moe {verb}: {VERBS[verb].__doc__}"]
    schema = _schema(verb)
    if schema is None:
        return "\n".join(text)
    name, kind = schema
    text.append(
        f"\nUsage: moe {verb} [GROUP=NAME …] [KEY=VALUE …] [--cfg job]   (--cfg job prints the composed config)"
    )
    composed: Any = OmegaConf.to_container(compose_dict([], name, kind), resolve=False, enum_to_str=True)
    if name != "generate":
        named = [group for group in groups() if group in (*composed, "experiment")]
        text.append("\nGroups:")
        text += [f"  {group}={'|'.join(choices(group)) or '(yours)'}" for group in named]
    text.append("\nKeys and their values in this command:")
    text.append(_indented(composed))
    return "\n".join(text)


def _indented(node: Any, prefix: str = "") -> str:
    lines = []
    for key, value in node.items():
        if isinstance(value, dict) and value:
            lines.append(_indented(value, f"{prefix}{key}."))
        else:
            lines.append(f"  {prefix}{key}={'null' if value is None else value}")
    return "\n".join(lines)


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print((__doc__ or "").strip())
        return
    verb, words = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise ConfigError(f"moe {verb}: no such verb; one of {', '.join(VERBS)} (`moe --help`)")
    if "-h" in words or "--help" in words:
        print(_help(verb))
        return
    if "--cfg" in words:
        at = words.index("--cfg")
        schema = _schema(verb)
        if schema is None or words[at + 1 : at + 2] != ["job"]:
            raise ConfigError(
                f"moe {verb} --cfg: only `moe train|plan|prepare|generate --cfg job` prints a composed config"
            )
        from moe.compose import to_yaml

        print(to_yaml(load_config(words[:at] + words[at + 2 :], *schema)), end="")
        return
    flags = [word for word in words if word.startswith("-")]
    if flags:
        raise ConfigError(
            f"moe {verb} {flags[0]}: no such option; configuration is key=value, options --help and --cfg job"
        )
    VERBS[verb](words)


def _first_here() -> bool:
    """What all ranks agree on is said once a machine."""
    from moe.dist.topology import world_from_environment

    return world_from_environment()[2] == 0


def main() -> None:
    """Console entry point; see the module's docstring for exit codes."""
    try:
        die_with_torchrun()  # before anything that takes its time to load
        _run(sys.argv[1:])
    except ValueError as error:
        if not for_user(error):
            raise
        # A rank that never joined speaks for itself.
        if _first_here() or (isinstance(error, StartError) and error.speaks):
            print(f"moe: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"moe: {error}", file=sys.stderr)
        sys.exit(1)
    except Stopped as stopped:
        if _first_here():
            print(f"moe: {stopped}", file=sys.stderr)
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        print("moe: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
