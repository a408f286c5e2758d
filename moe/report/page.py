"""`moe report RUN`: one HTML page about a run that opens anywhere, without a network.

The page loads nothing from outside, and its content security policy forbids it. Only the page's own script may run,
identified by its hash, so that text of a run could not run as a script even if it weren't escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from moe import __version__
from moe.report import charts, details, facts, palette, texts
from moe.report.answers import answers_table
from moe.report.heatmap import heatmap
from moe.report.reader import Routing, RunHistory, read_run
from moe.report.shell import asset, document, put

DENSE = '<p class="empty">dense model: no router</p>'


def write_report(run_dir: Path) -> Path:
    """Writes RUN_DIR/report.html and returns its path.

    Raises UserError (one line naming the file and the fix) if there is no such run, its metrics.jsonl is missing,
    empty or without a step, or config.yaml or routing.json can't be read.
    """
    return put(render(read_run(run_dir)), run_dir)


def render(run: RunHistory) -> str:
    """The whole page."""
    return document(
        kind="Training report",
        name=run.name,
        brief=facts.brief(run),
        tiles=charts.tiles(run),
        content="".join(_section(*section) for section in _sections(run)),
        footer=_provenance(run),
        scripts=[asset("moe.report", "page.js")],
    )


def routing_page(routing: dict[str, Any], layers: Sequence[int]) -> str:
    """A page of its own with what routing.json says: one text, coloured by expert. `layers` are the model's numbers."""
    return (
        f'<!doctype html><meta charset="utf-8"><style>{asset("moe.report", "page.css")}\n{palette.css()}</style>'
        f'<button type="button" id="theme" class="js-only" aria-label="Switch between light and dark">◐</button>'
        f"<main>{texts.coloured_text(Routing(**routing), layers)}</main>"
        f"<script>{asset('moe.report', 'page.js')}</script>"
    )


def _sections(run: RunHistory) -> list[tuple[str, str, str]]:
    """(id, heading, content) in the page's order."""
    balance = details.alarms(run.details) + charts.balance_charts(run) if run.sparse else DENSE
    shares, routed = DENSE, DENSE
    if run.sparse:
        shares = (
            heatmap(run.frame_steps, run.frames, run.layers(len(run.frames[-1])))
            if run.frames
            else _empty("No expert shares in metrics.jsonl.")
        )
        shares += details.tables(run.details, run.layers)
        routed = (
            texts.coloured_text(run.routing, run.layers(len(run.routing.experts)))
            if run.routing
            else _empty("No routing.json yet: evaluations write it.")
        )
    return [
        ("curves", "Loss", charts.loss_charts(run) or _empty("No finite loss in metrics.jsonl.")),
        ("training", "Optimizer and speed", charts.training_charts(run) or _empty("No metrics in metrics.jsonl.")),
        ("balance", "Balance", balance),
        ("experts", "Experts by layer", shares),
        ("text", "Who reads what", routed),
        *([("answers", "Answers", charts.answer_chart(run) + answers_table(run.answers))] if run.answers else []),
        ("samples", "Samples", texts.samples(run.samples) if run.samples else _empty("No samples.jsonl yet.")),
        ("config", "Configuration", texts.configuration(run) if run.config_text else _empty("No config.yaml here.")),
    ]


def _section(key: str, heading: str, content: str) -> str:
    return f'<section aria-labelledby="h-{key}"><h2 id="h-{key}">{heading}</h2>\n{content}\n</section>\n'


def _empty(text: str) -> str:
    return f'<p class="empty">{escape(text)}</p>'


def _provenance(run: RunHistory) -> str:
    """How many lines of metrics.jsonl the page shows and how many it leaves out."""
    parts = [f"moe {__version__}", f"{len(run.steps):,} steps of metrics.jsonl"]
    if run.repeated_steps:
        parts.append(f"{run.repeated_steps:,} lines replaced: their steps were trained again after a resume")
    if run.torn_lines:
        parts.append(f"{run.torn_lines:,} unreadable line{'s' * (run.torn_lines > 1)} skipped")
    return " · ".join(parts)
