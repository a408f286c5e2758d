"""Writes a report into the section "On a GPU" of a page.

    python -m moe.bench.gpu.page REPORT.json docs/performance.md

Replaces only the text between the two markers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe.bench.gpu.render import details, overview
from moe.bench.gpu.requirements import verdicts
from moe.durable import write_section
from moe.errors import UserError

BEGIN, END = "<!-- gpu report: begin -->", "<!-- gpu report: end -->"


def section(report: dict[str, Any], source: str) -> list[str]:
    """Markdown lines. Raises UserError for a dry run, whose numbers mean nothing."""
    if report["dry_run"]:
        raise UserError(f"{source}: a dry run's numbers mean nothing; a page takes a report of a GPU")
    lines = [
        f"`bash launch/gpu_report.sh`, {report['started']} UTC, {report['seconds']:.0f} s; all of it is in {source}."
    ]
    lines += ["", *verdicts(report), "", *overview(report["stages"])]
    for name, result in report["stages"].items():
        lines += ["", f"### {name}: {result['about']}", "", *details(result)]
    return lines


def write_report(page: Path, report: Path) -> None:
    """Raises UserError unless `page` has each of the two markers once."""

    def lines() -> Iterator[str]:  # read once the page is known to have a place for them
        yield from section(json.loads(report.read_text(encoding="utf-8")), str(report))

    write_section(page, BEGIN, END, lines())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m moe.bench.gpu.page REPORT.json PAGE.md")
    try:
        write_report(Path(sys.argv[2]), Path(sys.argv[1]))
    except UserError as error:
        print(f"moe: {error}", file=sys.stderr)
        sys.exit(2)
