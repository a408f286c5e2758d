"""The verbs of `moe`: each is a thin function that passes overrides to the part of the package that does the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe.cli.limits import require_address_space, require_open_files
from moe.config import Config, PlanConfig
from moe.config.compose import ConfigError, load_config


def _train(overrides: list[str]) -> None:
    """Pre-train or go on with a run: composes configs/train.yaml, writes run_dir."""
    from moe.distributed.rendezvous import world_from_environment

    config: Config = load_config(overrides)
    _, world_size, _, node_size = world_from_environment()
    config.check_world(world_size, node_size)
    require_open_files(world_size)
    require_address_space(config.engine)
    from moe.train.loop import train

    train(config)


def _plan(overrides: list[str]) -> None:
    """What a run would need before it is launched: memory, bytes on the links, time; every override of `moe train`.

    Exit code 2 when it doesn't fit the stated hardware.
    """
    from moe.plan.show import run_plan

    run_plan(load_config(overrides, "plan", PlanConfig))


def _prepare(overrides: list[str]) -> None:
    """Write the token shards that `moe train` with the same data and tokenizer keys would use."""
    config: Config = load_config(overrides)
    from moe.data.corpus import check_vocab
    from moe.data.prepare import prepare

    corpus = prepare(config.data, config.tokenizer)
    check_vocab(corpus, config.model.vocab_size)
    print(corpus.describe())


def _generate(overrides: list[str]) -> None:
    """Continue a prompt, or every line of a file, from a checkpoint."""
    from moe.config.generate import GenerateConfig, quote_texts
    from moe.inference.generate import run_generate

    config = load_config(quote_texts(overrides), "generate", GenerateConfig)
    from moe.checkpoint.layout import tokenizer_folder
    from moe.checkpoint.reader import load_model, resolve
    from moe.data.tokenizer import load_saved

    folder = resolve(Path(config.checkpoint))
    run_generate(config, load_model(folder, check_memory=config.check_memory), load_saved(tokenizer_folder(folder)))


def _report(overrides: list[str]) -> None:
    """Write RUN_DIR/report.html: curves, balance, expert shares, a text coloured by expert. No network needed."""
    if len(overrides) != 1 or "=" in overrides[0]:
        raise ConfigError(
            f"moe report {' '.join(overrides)}: give one run directory, as in `moe report runs/tiny-stdlib`"
        )
    from moe.report.page import write_report

    print(write_report(Path(overrides[0])))


def _bench(overrides: list[str]) -> None:
    """Measure: `peers` (a training step beside transformers'), `attention` (time per token against length)."""
    from moe.bench import run_bench

    run_bench(overrides)


VERBS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "plan": _plan,
    "prepare": _prepare,
    "generate": _generate,
    "report": _report,
    "bench": _bench,
}


def schema(verb: str) -> tuple[str, type] | None:
    if verb in ("train", "prepare"):
        return "train", Config
    if verb == "plan":
        return "plan", PlanConfig
    if verb == "generate":
        from moe.config.generate import GenerateConfig

        return "generate", GenerateConfig
    return None
