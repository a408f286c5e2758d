"""The table of faults: `@pytest.mark.fault(N)` names a row of docs/reliability.md, `outcome(...)` gives its result.

    python -m pytest --fault 6                                         the tests of row 6, in any folder
    python -m pytest --fault all --faults-table docs/reliability.md    all rows, and writes the table

A test run rewrites the rows whose tests it ran; the other rows stay as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

BEGIN, END = "<!-- faults: written by a test run -->", "<!-- end of faults -->"
HEAD = "| # | fault | required | result | command |\n| --- | --- | --- | --- | --- |"
ROWS = {  # number → fault, what is required of the run
    1: (
        "SIGKILL of one rank at ≥ 20 points of a save",
        "resumes from the newest complete checkpoint, never a partial one",
    ),
    2: ("SIGKILL of one rank in a step", "torchrun restarts it; the run resumes; losses bitwise equal"),
    3: ("SIGKILL of the whole job, or of torchrun alone", "no rank survives; the same command resumes; bitwise equal"),
    4: ("disk full during a save", "older checkpoints intact, one line with path and bytes; ends after K failures"),
    5: ("each file of a checkpoint cut, one bit flipped, deleted", "found, file named, previous checkpoint loaded"),
    6: ("NaN, Inf or a gradient spike on one rank", "all ranks skip the step; counted; ends after K, naming samples"),
    7: ("a rank is stopped in a collective (SIGSTOP)", "ends in time; rank named, others' stacks printed; restarted"),
    8: ("SIGTERM, SIGUSR1, SIGTERM again during the save", "saved in time, documented exit codes, bitwise resume"),
    9: ("resume at another size: ranks 2→1, 1→2; EP 2→1, 1→2, 4→2", "same samples in the same order, loss gap ≤ 1e-5"),
    10: ("W&B: connection refused, no key, its process killed", "continues, one warning, offline copy complete"),
    11: ("two jobs on one run directory", "the second ends with an error"),
    12: ("malicious pickle as checkpoint, tokenizer, data; `_target_`", "the payload never runs"),
    13: ("secrets in the environment", "in no log, configuration, metrics or W&B file"),
    14: ("a straggler: +200 ms a step on one rank", "guard.name_stragglers names the rank within 20 steps"),
    15: ("20 random kills in one run", "finishes; final weights bitwise equal"),
    16: (
        "a stray shard in a checkpoint; a manifest that doesn't fit",
        "named and not read; bitwise equal; or an error",
    ),
    17: ("a node with other code or versions", "all ranks end before the first step; the versions and ranks named"),
    18: (
        "corrupt token shards: bytes changed at equal size; a file cut in mid-run",
        "found, file named, prepared again; a cut ends all ranks with one line",
    ),
    19: (
        "the run directory removed, renamed or replaced in mid-run",
        "ends with one line; never a run that can't be used",
    ),
    20: ("no room for temporary files when a rank hangs", "the report is complete, the stopped rank is ended"),
    21: (
        "EIO in one call on a file of the run or the data's cache, at random",
        "goes on whole, or ends with one line and exit code 1 and resumes; bitwise equal",
    ),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--fault", action="append", help="run this row's tests only (a number or `all`; repeatable)")
    group.addoption("--faults-table", metavar="FILE", help="write the results into the table of faults in FILE")


@pytest.fixture
def outcome(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """`outcome("resumed at step 7, gap 0")`: the test's result in its row of the table; several calls are joined."""
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
    """Collects the rows of one test run."""

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
            outcomes = [str(text) for name, text in report.user_properties if name == "outcome"]
            self._outcomes[row] += [text for text in outcomes if text not in self._outcomes[row]]

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
        result = "; ".join(self._outcomes[number]).replace("|", "\\|").replace("\n", " ")
        if failed:
            result = "**failed**: " + ", ".join(failed)
        elif not passed:
            result = "not run"
        elif len(passed) < self._tests[number]:
            result += f" ({len(passed)} of {self._tests[number]} tests were run)"
        fault, required = ROWS[number]
        return f"| {number} | {fault} | {required} | {result} | `python -m pytest --fault {number}` |"


def pytest_configure(config: pytest.Config) -> None:
    known = {"all", *map(str, ROWS)}
    for row in config.getoption("--fault") or []:
        if row not in known:
            raise pytest.UsageError(f"--fault {row}: must be one of {', '.join(map(str, ROWS))} or all")
    config.pluginmanager.register(_Table(config), "fault-table")
