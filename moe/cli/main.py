"""`moe VERB key=value …` (or `python -m moe …`; under torchrun: `torchrun … -m moe …`).

    moe train                                             a tiny Mixtral on text that comes with Python
    moe train model=small data.path='*.txt'               your own text
    torchrun --nproc-per-node 8 -m moe train model=mixtral_8x7b parallel.expert_parallel_size=8 \\
        train.precision=bfloat16 train.global_batch_size=64
    moe train -m router.aux_loss_coef=0.001,0.01          one run for each value
    moe sweep sweep=router_quick                          a search by Optuna: trials.csv and a page
    moe plan model=mistral_7b hardware=h100 train.precision=bfloat16 train.global_batch_size=64
                                                          the memory and time of a run, before it is launched
    moe prepare data.path=corpus.jsonl                    write only the token shards
    moe validate data.path=chats.jsonl                    rows for fine-tuning: which are bad and why, what is learnt
    moe generate checkpoint=RUN_DIR prompt='Once'         text from a checkpoint
    moe chat checkpoint=runs/chat                         a conversation with a fine-tuned one
    moe evaluate checkpoint=RUN_DIR tasks=sums include_path=tasks
                                                          tasks of lm-evaluation-harness, its own or yours
    moe import checkpoint=HF_DIR run_dir=runs/imported    a Hugging Face model as a checkpoint
    moe export checkpoint=RUN_DIR path=runs/exported      a checkpoint as a Hugging Face model
    moe upcycle checkpoint=runs/dense run_dir=runs/upcycled
                                                          a sparse model made from a dense one: experts are copies
    moe report RUN_DIR                                    one HTML page about a run, or about a sweep
    moe analyze checkpoint=RUN_DIR                        what its routers learnt: a page, JSON and CSV
    moe bench peers                                       our training step compared with transformers'
    moe doctor                                            whether this machine can train, and with which back-ends
    moe ls                                                verbs, configuration groups and their presets
    moe cp model/small mine.yaml                          a preset to edit: moe train model=mine.yaml

`moe VERB --help` lists the verb's keys. Exit codes: 0 done; 1 a fault of the program or the machine; 2 something to
change in the command, the configuration or the data, or a plan that doesn't fit (one line on stderr says what); 75
training hung (stderr says which rank and where; guard.hang_seconds); 128 + N stopped by signal N (130 Ctrl-C, 138
SIGUSR1, 143 SIGTERM), a training run after saving its state. After 75 and 128 + N the same command resumes from the
newest checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import NoReturn

from moe.cli.verbs import OPTIONS, SCHEMAS, VERBS, load
from moe.distributed.environment import world_from_environment
from moe.distributed.parent import die_with_parent
from moe.errors import (
    ConfigError,
    OtherRankFailed,
    StartError,
    Stopped,
    UserError,
    is_device_fault,
    line_about,
    lost_rank,
)

LONGEST_LINE = 1200  # characters
HEAD_START = 2.0  # seconds that the other ranks wait for the rank that prints
LONG_HEAD_START = 8.0  # seconds until a rank whose connections have closed should have ended


def _run(arguments: list[str]) -> None:
    arguments = _take_config_dirs(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print((__doc__ or "").strip())
        return
    verb, overrides = arguments[0], arguments[1:]
    if verb not in VERBS:
        from moe.config.suggest import closest

        near = "train" if "=" in verb else closest(verb, list(VERBS))
        meant = (
            f"did you mean `moe {near}{f' {verb}' if '=' in verb else ''}`?" if near else f"one of {', '.join(VERBS)}"
        )
        raise ConfigError(f"{verb}: no such verb; {meant}")
    if "-h" in overrides or "--help" in overrides:
        from moe.cli.help import help_text

        print(help_text(verb))
        return
    if "--cfg" in overrides:
        at = overrides.index("--cfg")
        if verb not in SCHEMAS or overrides[at + 1 : at + 2] != ["job"]:
            raise ConfigError(f"--cfg: only `moe {'|'.join(SCHEMAS)} --cfg job` prints a composed config")
        config = load(overrides[:at] + overrides[at + 2 :], verb)
        from moe.config.compose import to_yaml

        print(to_yaml(config), end="")
        return
    flags = [override for override in overrides if override.startswith("-") and override not in OPTIONS.get(verb, ())]
    if flags:
        raise ConfigError(
            f"{flags[0]}: no such option of `moe {verb}`; configuration is key=value, options are --help, --cfg job "
            "and --config-dir DIR"
        )
    VERBS[verb](overrides)


def _take_config_dirs(arguments: list[str]) -> list[str]:
    """Adds every `--config-dir DIR` (or `--config-dir=DIR`) and returns the other arguments. Raises UserError."""
    rest, waiting = [], iter(arguments)
    for argument in waiting:
        if argument == "--config-dir":
            _add_config_dir(next(waiting, ""))
        elif argument.startswith("--config-dir="):
            _add_config_dir(argument.partition("=")[2])
        else:
            rest.append(argument)
    return rest


def _add_config_dir(folder: str) -> None:
    if not folder:
        raise ConfigError("--config-dir: must be followed by a folder of presets")
    from moe.config.presets import add_config_dir

    add_config_dir(Path(folder))


def _is_local_rank_0() -> bool:
    """A message that is the same on all ranks is printed by one rank of each machine."""
    try:
        return world_from_environment()[2] == 0
    except StartError:  # it isn't known which rank this is: the error is printed
        return True


def _exit(code: int, line: str) -> NoReturn:
    """Ends with `code` after `line` was printed. torchrun then writes some thirty lines, its own traceback among them,
    which no rank can prevent: print what they are, and have torchrun's closing table repeat `line`."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        if _is_local_rank_0():
            print(
                f"(torchrun now reports that its processes ended, exit code {code}; the reason is above)",
                file=sys.stderr,
            )
        else:  # torchrun kills the other ranks once one has ended: the one that prints goes first
            time.sleep(HEAD_START)
        message = {"message": line, "extraInfo": {"timestamp": str(int(time.time())), "py_callstack": line}}
        # The line is on stderr already; a full disk must not hide it behind a traceback.
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")
    sys.exit(code)


def _shortened(line: str) -> str:
    """The line, or its beginning and end if it is longer than LONGEST_LINE."""
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} … {line[-LONGEST_LINE // 2 :]}"


def _end_with(line: str) -> NoReturn:
    line = _shortened(line)
    print(line, file=sys.stderr, flush=True)
    _exit(1, line)


def _forget_odd_sizes() -> None:
    """Removes COLUMNS and LINES from the environment where they are not a terminal's size: rich would fail on them."""
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("[0-9]{1,4}", os.environ.get(name, "0")):
            del os.environ[name]


def main() -> None:
    """Console entry point; see the module's docstring for exit codes."""
    try:
        _forget_odd_sizes()
        die_with_parent()  # before the slow imports, during which the parent may die
        _run(sys.argv[1:])
    except UserError as error:
        line = _shortened(f"moe: {' '.join(str(error).split())}")
        # A message that is the same on all ranks is printed by one rank of each machine; a rank that never joined the
        # others prints its own.
        if _is_local_rank_0() or (isinstance(error, StartError) and error.prints):
            print(line, file=sys.stderr, flush=True)
        _exit(1 if is_device_fault(error) else 2, line)
    except (OSError, OtherRankFailed) as error:
        _end_with(f"moe: {line_about(error)}")
    except (MemoryError, RuntimeError, ImportError) as error:
        from moe.cli.limits import out_of_memory

        line = out_of_memory(error)
        if line is None and (line := lost_rank(error)):
            time.sleep(LONG_HEAD_START)  # torchrun ends this rank meanwhile, so only the lost rank's line is printed
        if line is None:
            raise
        _end_with(f"moe: {line}")
    except Stopped as stopped:
        if _is_local_rank_0():
            print(f"moe: {stopped}", file=sys.stderr)
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        print("moe: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
