"""Runs one case: a command in a forked process, which starts in milliseconds, and judges how it ended."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from moe.cli import main as cli

SECONDS = 60.0
CODES = {0, 1, 2}
OUTSIDE = "outside"  # beside the run directory


@dataclass(frozen=True)
class Case:
    """`must_fail`: exit code 0 is wrong, since the input is known to be unusable. `never` must not be printed."""

    area: str
    name: str
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    must_fail: bool = False
    never: str = ""


@dataclass(frozen=True)
class Ended:
    """How a case ended; `fault` says what it did wrong, empty if nothing."""

    case: Case
    code: int | None
    out: str
    err: str
    fault: str


class Running:
    """`moe ARGUMENTS` in a forked process with `folder` as working directory, which keeps what the command wrote."""

    def __init__(self, case: Case, folder: Path) -> None:
        self._case, self._paths, self._outside = case, (folder / ".out", folder / ".err"), folder / OUTSIDE
        self._deadline = time.monotonic() + SECONDS
        self._child = os.fork()
        if self._child == 0:
            _become(case, folder, *self._paths)

    def poll(self) -> Ended | None:
        """How it ended; None while it runs. After `SECONDS` it is killed."""
        done, status = os.waitpid(self._child, os.WNOHANG)
        code: int | None = os.waitstatus_to_exitcode(status) if done else None
        if not done:
            if time.monotonic() < self._deadline:
                return None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in self._paths)
        fault = _fault(self._case, code, out, err)
        if not fault and self._outside.exists():
            fault = "wrote through a link to a file outside the run directory"
        return Ended(self._case, code, out, err, fault)


def run(case: Case, folder: Path) -> Ended:
    running = Running(case, folder)
    while (ended := running.poll()) is None:
        time.sleep(0.01)
    return ended


def _become(case: Case, folder: Path, out: Path, err: Path) -> None:
    """The child: never returns."""
    code = 70
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False)  # as Python's own
        os.environ.update(case.environment)
        # What a shell can pass: a byte that isn't UTF-8 arrives as one of U+DC80 to U+DCFF.
        sys.argv = ["moe", *(one.replace("\ud800", "\udcff") for one in case.arguments)]
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _fault(case: Case, code: int | None, out: str, err: str) -> str:
    if code is None:
        return f"hung for {SECONDS:g} s"
    if code < 0:
        return f"ended by signal {-code}"
    if "Traceback (most recent call last)" in err + out:
        return "a traceback"
    if code not in CODES:
        return f"exit code {code}"
    lines = [line for line in err.splitlines() if line.startswith("moe: ")]
    if code and len(lines) != 1:
        return f"exit code {code} with {len(lines)} messages"
    if code and len(lines[0]) > 1500:
        return f"a message of {len(lines[0])} characters"
    if case.never and case.never in out + err:
        return f"{case.never} was printed"
    if not code and case.must_fail:
        return "exit code 0"
    return ""
