"""Faults as tests: `@pytest.mark.fault(N)` names a row of docs/reliability.md, `outcome(...)` tells what came out.

    python -m pytest --fault 6                                  the tests of row 6, wherever they live
    python -m pytest --fault all --faults-table docs/reliability.md    all of them, and the table is written

A row is written by a session that ran tests of it; the other rows keep what an earlier one wrote.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

BEGIN, END = "<!-- faults: written by a test run -->", "<!-- end of faults -->"
HEAD = "| # | fault | required | what came out | run it |\n| --- | --- | --- | --- | --- |"
ROWS = {  # number → fault, what is required of the run
    1: ("SIGKILL one rank at ≥ 20 points of a save", "resumes from the newest complete one; no torn load; by itself"),
    2: ("SIGKILL one rank in a step, torchrun restarts it", "resumes by itself; later losses bitwise the same"),
    3: ("SIGKILL of the whole job, or of torchrun alone", "no rank is left; the same command: bitwise the same"),
    4: ("disk full during a save", "older ones intact, path and bytes in one line, goes on; stops after K failures"),
    5: ("each file of a checkpoint cut, one bit flipped, deleted", "found, file named, the previous one is taken"),
    6: ("NaN, Inf or a gradient spike on one rank", "no rank's weights move; counted; stops after K, naming samples"),
    7: ("a rank is stopped in a collective (SIGSTOP)", "ended in time, rank named, stacks of the others, restarted"),
    8: ("SIGTERM, SIGUSR1, SIGTERM again during the save", "saved in time, documented exit codes, exact resume"),
    9: ("world 2→1, 1→2, EP 2→1, 1→2, 4→2", "loads, the same global token order, loss gap ≤ 1e-5"),
    10: ("W&B: refused, no key, dies in mid-run", "training goes on, one warning, offline copy complete"),
    11: ("two jobs on one run directory", "the second is refused"),
    12: ("malicious pickle as checkpoint, tokenizer, data; `_target_`", "the payload never runs"),
    13: ("secrets in the environment", "in no log, configuration, figure or W&B file"),
    14: ("a straggler: +200 ms a step on one rank", "a warning names the rank within 20 steps"),
    15: ("20 random kills in one run", "finishes; final weights bitwise the same"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--fault", action="append", help="run this row's tests only (a number or `all`; repeatable)")
    group.addoption("--faults-table", metavar="FILE", help="write what came out into FILE's table of faults")


@pytest.fixture
def outcome(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """`outcome("resumed at step 7, gap 0")`: a short sentence for the test's row; several calls join."""
    return lambda text: record_property("outcome", text)


def _row(item: pytest.Item) -> int | None:
    marker = item.get_closest_marker("fault")
    if marker is None:
        return None
    (number,) = marker.args
    if number not in ROWS:
        raise pytest.UsageError(f"{item.nodeid}: fault({number}) is no row of {__name__}")
    return number


class _Table:
    """Rows gathered over one session."""

    def __init__(self, config: pytest.Config) -> None:
        self._wanted: list[str] = config.getoption("--fault") or []
        self._file: str | None = config.getoption("--faults-table")
        self._row_of: dict[str, int] = {}
        self._tests: dict[int, int] = defaultdict(int)  # collected, whether selected or not
        self._passed: dict[int, set[str]] = defaultdict(set)
        self._failed: dict[int, list[str]] = defaultdict(list)
        self._outcomes: dict[int, list[str]] = defaultdict(list)

    @pytest.hookimpl(tryfirst=True)  # before -m and -k deselect
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, left = [], []
        for item in items:
            row = _row(item)
            if row is not None:
                self._row_of[item.nodeid] = row
                self._tests[row] += 1
            chosen = not self._wanted or (row is not None and ("all" in self._wanted or str(row) in self._wanted))
            (kept if chosen else left).append(item)
        if left:
            config.hook.pytest_deselected(items=left)
            items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row = self._row_of.get(report.nodeid)
        if row is None:
            return
        if report.failed:
            self._failed[row].append(report.nodeid)
        elif report.passed and report.when == "call":
            self._passed[row].add(report.nodeid)
            told = [str(text) for name, text in report.user_properties if name == "outcome"]
            self._outcomes[row] += [text for text in told if text not in self._outcomes[row]]

    def pytest_sessionfinish(self) -> None:
        if self._file is None:
            return
        path = Path(self._file)
        text = path.read_text(encoding="utf-8")
        before, begin, rest = text.partition(BEGIN)
        old, end, after = rest.partition(END)
        if not (begin and end):
            raise pytest.UsageError(f"{path}: no {BEGIN} … {END} to write between")
        kept = {line.split("|")[1].strip(): line for line in old.splitlines() if line.count("|") > 4}
        lines = [self._line(number, kept.get(str(number))) for number in ROWS]
        path.write_text("\n".join([before + begin, HEAD, *lines, end]) + after, encoding="utf-8")

    def _line(self, number: int, kept: str | None) -> str:
        passed, failed = self._passed[number], sorted(set(self._failed[number]))
        if not passed and not failed and kept is not None:
            return kept
        told = "; ".join(self._outcomes[number]).replace("|", "\\|").replace("\n", " ")
        if failed:
            told = "**failed**: " + ", ".join(failed)
        elif not passed:
            told = "not run"
        elif len(passed) < self._tests[number]:
            told += f" ({len(passed)} of {self._tests[number]} tests were run)"
        fault, required = ROWS[number]
        return f"| {number} | {fault} | {required} | {told} | `python -m pytest --fault {number}` |"


def pytest_configure(config: pytest.Config) -> None:
    known = {"all", *map(str, ROWS)}
    for word in config.getoption("--fault") or []:
        if word not in known:
            raise pytest.UsageError(f"--fault {word}: one of {', '.join(map(str, ROWS))} or all")
    config.pluginmanager.register(_Table(config), "fault-table")
