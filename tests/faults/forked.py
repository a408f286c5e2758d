"""`moe` in forked ranks, with faults injected: starts in one second instead of torchrun's ten."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.cli import main as cli
from tests.faults.inject import inject
from tests.ranks import run_ranks


@dataclass(frozen=True)
class Finished:
    """Exit code and output of one rank's process; `out` and `err` include what C libraries wrote."""

    code: int
    out: str
    err: str


def moe_ranks(
    *overrides: str,
    ranks: int = 1,
    faults: tuple[dict[str, Any], ...] = (),
    more: dict[str, str] | None = None,
    timeout: float = 240,
) -> list[Finished]:
    """Runs `moe OVERRIDES` in `ranks` forked processes; results by rank. `more` is added to their environment."""
    return run_ranks(ranks, moe_here, list(overrides), faults, more or {}, timeout=timeout)


def moe_here(overrides: list[str], faults: tuple[dict[str, Any], ...], more: dict[str, str]) -> Finished:
    """Runs `moe OVERRIDES` in this process, which must be a forked one."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        del os.environ[name]
    os.environ.update(more)
    for fault in faults:
        inject(fault, int(os.environ["RANK"]))
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder, "out"), Path(folder, "err")
        with paths[0].open("w") as out, paths[1].open("w") as err:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = _exit_code(overrides)
        return Finished(code, *(path.read_text(errors="replace") for path in paths))


def _exit_code(overrides: list[str]) -> int:
    """The exit code that the process would end with; a traceback is printed to stderr, as Python does."""
    sys.argv = ["moe", *overrides]
    try:
        cli.main()
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0
