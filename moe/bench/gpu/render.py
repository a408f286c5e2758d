"""A report as Markdown, for its summary.md and for the section of docs/performance.md."""

from __future__ import annotations

from typing import Any

from moe.bench.gpu.requirements import verdicts
from moe.bench.markdown import cell, table


def summary(report: dict[str, Any]) -> str:
    """Tables of the requirements and of all stages, then each stage's results."""
    stages = report["stages"]
    lines = ["# GPU report", "", f"{report['started']} UTC, {report['seconds']:.0f} s in all."]
    if report["dry_run"]:
        lines += ["", "**Dry run on the CPU with tiny sizes: the numbers mean nothing.**"]
    lines += ["", *verdicts(report), "", *overview(stages)]
    for name, result in stages.items():
        lines += ["", f"## {name}: {result['about']}", "", *details(result)]
    return "\n".join(lines) + "\n"


def overview(stages: dict[str, Any]) -> list[str]:
    """A Markdown table with one row per stage."""
    rows = [[name, each["state"], f"{each['seconds']:.0f} s", each["headline"]] for name, each in stages.items()]
    return table(["stage", "state", "time", "result"], rows)


def details(result: dict[str, Any]) -> list[str]:
    """A stage's facts, tables, checks and error, as Markdown lines."""
    parts: list[list[str]] = []
    if result["facts"]:
        parts.append([f"- {name.replace('_', ' ')}: {cell(value)}" for name, value in result["facts"].items()])
    for each in result["tables"]:
        parts.append([f"**{each['title']}**", "", *table(each["columns"], each["rows"])])
    if result["checks"]:
        rows = [
            [check["name"], check["value"], check["limit"], "yes" if check["passed"] else "NO"]
            for check in result["checks"]
        ]
        parts.append(table(["check", "value", "limit", "passed"], rows))
    if result["error"]:
        parts.append(["```", *result["error"], "```"])
    lines: list[str] = []
    for part in parts:
        lines += [*([""] if lines else []), *part]
    return lines or ["(nothing recorded)"]
