"""`moe VERB key=value …` (or `python -m moe …`; under torchrun: `torchrun … -m moe …`).

    moe train                                             a tiny Mixtral on text that comes with Python
    moe train model=small data.path='*.txt'               your own text
    torchrun --nproc-per-node 8 -m moe train model=mixtral_8x7b parallel.expert_parallel_size=8 train.precision=bfloat16
    moe plan model=mixtral_8x7b hardware=h100 …           the memory and time of a run, before it is launched
    moe prepare data.path=corpus.jsonl                    only the token shards
    moe generate checkpoint=RUN_DIR prompt='Once'         text from a checkpoint
    moe report RUN_DIR                                    one HTML page about a run
    moe bench peers                                       our training step compared with transformers'

`moe VERB --help` lists the verb's keys. Exit codes: 0 done; 1 a fault of the program or the machine; 2 something to
change in the command, the configuration or the data (one line on stderr says what); 75 training hung (stderr says
which rank and where; guard.hang_seconds); 128 + N stopped by signal N (130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM), a
training run after saving its state. After 75 and 128 + N the same command resumes from the newest checkpoint.
"""

from __future__ import annotations

import sys

from moe.cli.help import help_text
from moe.cli.verbs import VERBS, schema
from moe.config.compose import ConfigError, load_config
from moe.distributed.parent import die_with_torchrun
from moe.errors import OtherRankFailed, StartError, Stopped, UserError


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print((__doc__ or "").strip())
        return
    verb, overrides = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise ConfigError(f"moe {verb}: no such verb; one of {', '.join(VERBS)} (`moe --help`)")
    if "-h" in overrides or "--help" in overrides:
        print(help_text(verb))
        return
    if "--cfg" in overrides:
        at = overrides.index("--cfg")
        composed_from = schema(verb)
        if composed_from is None or overrides[at + 1 : at + 2] != ["job"]:
            raise ConfigError(
                f"moe {verb} --cfg: only `moe train|plan|prepare|generate --cfg job` prints a composed config"
            )
        from moe.config.compose import to_yaml

        print(to_yaml(load_config(overrides[:at] + overrides[at + 2 :], *composed_from)), end="")
        return
    flags = [override for override in overrides if override.startswith("-")]
    if flags:
        raise ConfigError(
            f"moe {verb} {flags[0]}: no such option; configuration is key=value, options --help and --cfg job"
        )
    VERBS[verb](overrides)


def _is_local_rank_0() -> bool:
    """A message that is the same on all ranks is printed by one rank of each machine."""
    from moe.distributed.rendezvous import world_from_environment

    return world_from_environment()[2] == 0


def main() -> None:
    """Console entry point; see the module's docstring for exit codes."""
    try:
        die_with_torchrun()  # before the slow imports, during which torchrun may die
        _run(sys.argv[1:])
    except UserError as error:
        # A rank that never joined the others prints its own message.
        if _is_local_rank_0() or (isinstance(error, StartError) and error.prints):
            print(f"moe: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (OSError, OtherRankFailed) as error:
        print(f"moe: {error}", file=sys.stderr)
        sys.exit(1)
    except Stopped as stopped:
        if _is_local_rank_0():
            print(f"moe: {stopped}", file=sys.stderr)
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        print("moe: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
