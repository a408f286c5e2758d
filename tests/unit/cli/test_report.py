"""`moe report`'s words: one folder, and of a sweep a page and a point."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe.cli.report import run_report
from moe.errors import UserError
from moe.report.sweep_reader import point_label, read_sweep
from tests.unit.report.made_sweep import write_sweep


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"report \(nothing\): give one run directory"),
        (["a", "b"], "report a b: give one run directory"),
        (["a", "page=x.md"], "report page: give one run directory, .* markdown=PAGE.md reference=POINT"),
        (["nowhere", "markdown=x.md", "reference=aux"], "markdown=: nowhere isn't a sweep's folder"),
    ],
)
def test_other_words_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_report(words)


def test_a_page_needs_the_point_that_differences_are_to(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    with pytest.raises(UserError, match=r"markdown=PAGE\.md and reference=POINT belong together"):
        run_report([str(tmp_path), f"markdown={tmp_path / 'page.md'}"])


def test_a_sweeps_table_goes_into_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path, points=2)
    sweep, page = read_sweep(tmp_path), tmp_path / "page.md"
    reference = point_label(sweep.trials[0], sweep.names)
    run_report([str(tmp_path), f"markdown={page}", f"reference={reference}"])
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    (row,) = (line for line in page.read_text().splitlines() if line.startswith(f"| {reference} | "))
    assert " M) | 3 | " in row, "the model's size, three seeds"
