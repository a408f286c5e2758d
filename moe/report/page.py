"""`moe report RUN`: one HTML page about a run that opens anywhere, without a network.

The page loads nothing from outside, and its content security policy forbids it. Only the page's own script may run,
identified by its hash, so that text of a run could not run as a script even if it weren't escaped.
"""

from __future__ import annotations

import base64
import hashlib
import os
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from moe import __version__
from moe.report import charts, details, facts, palette, texts
from moe.report.heatmap import heatmap
from moe.report.reader import Routing, RunHistory, read_run

DENSE = '<p class="empty">dense model: no router</p>'


def write_report(run_dir: Path) -> Path:
    """Writes RUN_DIR/report.html and returns its path.

    Raises UserError (one line naming the file and the fix) if there is no such run, its metrics.jsonl is missing,
    empty or without a step, or config.yaml or routing.json can't be read.
    """
    page = render(read_run(run_dir))
    target = run_dir / "report.html"
    beside = run_dir / f".report.{os.getpid()}.html"
    beside.unlink(missing_ok=True)  # what lies there may be a link to another file
    with beside.open("xb") as file:  # `replace`: JSON may hold half a surrogate pair, which no encoding can write
        file.write(page.encode("utf-8", errors="replace"))
    os.replace(beside, target)  # a browser that reloads never sees half a page
    return target


def render(run: RunHistory) -> str:
    """The whole page."""
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    name = escape(run.name)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name} · training report</title>
<link rel="icon" href="data:,">
<style>
{_asset("page.css")}
{palette.css()}
</style>
</head>
<body>
<a class="skip" href="#main">Skip to the curves</a>
<header>
<div class="top"><p class="kicker">Training report</p>
<button type="button" id="theme" class="js-only" aria-label="Switch between light and dark">◐</button></div>
<h1>{name}</h1>
<ul class="brief">{"".join(f"<li>{escape(phrase)}</li>" for phrase in facts.brief(run))}</ul>
{charts.tiles(run)}
</header>
<main id="main">
{"".join(_section(*section) for section in _sections(run))}
</main>
<footer><p>{_provenance(run)}</p></footer>
<script>{script}</script>
</body>
</html>
"""


def routing_page(routing: dict[str, Any]) -> str:
    """A page of its own with what routing.json says: one text, coloured by expert."""
    return (
        f'<!doctype html><meta charset="utf-8"><style>{_asset("page.css")}\n{palette.css()}</style>'
        f'<button type="button" id="theme" class="js-only" aria-label="Switch between light and dark">◐</button>'
        f"<main>{texts.coloured_text(Routing(**routing))}</main><script>{_asset('page.js')}</script>"
    )


def _sections(run: RunHistory) -> list[tuple[str, str, str]]:
    """(id, heading, content) in the page's order."""
    balance = details.alarms(run.details) + charts.balance_charts(run) if run.sparse else DENSE
    shares, routed = DENSE, DENSE
    if run.sparse:
        shares = heatmap(run.frame_steps, run.frames) if run.frames else _empty("No expert shares in metrics.jsonl.")
        shares += details.tables(run.details)
        routed = (
            texts.coloured_text(run.routing) if run.routing else _empty("No routing.json yet: evaluations write it.")
        )
    return [
        ("curves", "Loss", charts.loss_charts(run) or _empty("No finite loss in metrics.jsonl.")),
        ("training", "Optimizer and speed", charts.training_charts(run) or _empty("No metrics in metrics.jsonl.")),
        ("balance", "Balance", balance),
        ("experts", "Experts by layer", shares),
        ("text", "Who reads what", routed),
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
    return escape(" · ".join(parts))


def _asset(name: str) -> str:
    return (resources.files("moe.report") / name).read_text(encoding="utf-8")
