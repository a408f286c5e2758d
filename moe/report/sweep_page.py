"""`moe report SWEEP`: one HTML page about a sweep. Its charts are plotly's, whose script is in the page: no network."""

from __future__ import annotations

import json
import math
import shlex
from html import escape
from importlib import resources
from pathlib import Path

from moe import __version__
from moe.report import sweep_figures
from moe.report.scales import short
from moe.report.shell import asset, document, put
from moe.report.sweep_reader import COMPLETE, JSON, SweepHistory, TrialRow, point_label, read_sweep, value_label
from moe.report.sweep_statistics import Point, differences, interval, points

ROWS = 200  # of the table; trials.csv has all


def is_sweep(folder: Path) -> bool:
    return (folder / JSON).is_file()


def write_sweep_report(folder: Path) -> Path:
    """Writes SWEEP/report.html and returns its path. Raises UserError as `read_sweep` does."""
    return put(render(read_sweep(folder)), folder)


def render(sweep: SweepHistory) -> str:
    """The whole page."""
    found = points(sweep)
    return document(
        kind="Sweep",
        name=sweep.folder.resolve().name,
        brief=_brief(sweep),
        tiles=_tiles(sweep, found),
        content="".join(_section(*section) for section in _sections(sweep, found)),
        footer=f"moe {__version__} · {len(sweep.trials)} finished trials of trials.csv",
        scripts=[_plotly(), asset("moe.report", "sweep.js")],
        styles=[asset("moe.report", "sweep.css")],
        images="data: blob:",
    )


def _brief(sweep: SweepHistory) -> list[str]:
    objectives = [f"{name} {'↑' if name in sweep.maximize else '↓'}" for name in sweep.objectives]
    return [
        f"sampler {sweep.sampler}",
        f"objectives {', '.join(objectives)}",
        f"searched {', '.join(sweep.names)}",
        f"{sweep.seeds} seed{'s' * (sweep.seeds > 1)} a point",
        f"{sweep.steps:,} steps a trial",
    ]


def _tiles(sweep: SweepHistory, found: list[Point]) -> str:
    states = [row.state for row in sweep.trials]
    asked = f"of {sweep.asked}" if sweep.asked else ""
    tiles = [("Trials", str(len(states)), asked, f"{states.count(COMPLETE)} complete")]
    for name in dict.fromkeys((sweep.objectives[0], sweep_figures.second(sweep))):
        values = [point.mean(name) for point in found if math.isfinite(point.mean(name))]
        best = (max if name in sweep.maximize else min)(values, default=math.nan)
        worst = (min if name in sweep.maximize else max)(values, default=math.nan)
        tiles.append((f"Best {name}", short(best), "", f"worst {short(worst)}"))
    told = [(name, str(states.count(state)), "", "") for name, state in (("Pruned", "PRUNED"), ("Failed", "FAIL"))]
    seconds = math.fsum(row.seconds for row in sweep.trials)
    tiles += [*told, ("Training", f"{seconds / 60:.1f}", "min", "of all trials")]
    return "<dl class=tiles>" + "".join(_tile(*tile) for tile in tiles) + "</dl>"


def _tile(name: str, value: str, unit: str, note: str) -> str:
    unit = f" <small>{escape(unit)}</small>" if unit else ""
    return f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{unit}<span>{escape(note)}</span></dd></div>"


def _sections(sweep: SweepHistory, found: list[Point]) -> list[tuple[str, str, str]]:
    if not found:
        return [("table", "Trials", _empty("No trial is complete yet.") + _table(sweep))]
    name = sweep.objectives[0]
    pair = f"{name} against {sweep_figures.second(sweep)}"
    fronts = _chart(pair, sweep_figures.front(sweep, found), _front_note(sweep), "tall")
    lines = _chart("A line a trial, the best quarter in colour", sweep_figures.parallel(sweep), "", "tall")
    each = "".join(_chart(key, sweep_figures.effects(sweep, found, key, name)) for key in sweep.names)
    note = _note(
        "Dots are trials; with bars, the mean over points and Student's 95 % interval of it, for each value or for "
        "bins of equally many points; a point is the mean of its seeds. Other keys vary at the same time: an interval "
        "that includes them is wide."
    )
    return [
        ("best", "The best point again", _command(sweep, found)),
        ("front", "Loss and balance", fronts),
        ("parallel", "Parallel coordinates", lines),
        ("effects", f"Effect on {escape(name)}", f'<div class="grid-of-charts pair">{each}</div>{note}'),
        ("importance", "Importance", _importance(sweep)),
        ("noise", "Seed noise", _noise(sweep, found)),
        ("balance", "Balance over the steps", _balance(sweep, found)),
        ("table", "Trials", _table(sweep)),
    ]


def _front_note(sweep: SweepHistory) -> str:
    return "A dot is a point's mean over its seeds" + (
        ", its bars Student's 95 % interval." if sweep.seeds > 1 else "."
    )


def _command(sweep: SweepHistory, found: list[Point]) -> str:
    row = found[0].best
    command = shlex.join(["moe", "train", *row.command, f"run_dir={sweep.folder.name}-best"])
    told = f"{point_label(row, sweep.names)}, seed {row.seed}: the lowest mean {sweep.objectives[0]}"
    told = told.replace("lowest", "highest") if sweep.objectives[0] in sweep.maximize else told
    return f'<div class="card"><pre>{escape(command)}</pre></div>{_note(told + ".")}'


def _importance(sweep: SweepHistory) -> str:
    if not sweep.importance:
        return _empty("Needs a few more complete trials whose searched keys and objectives differ.")
    return _chart(
        "Optuna's importance (PED-ANOVA)",
        sweep_figures.importance(sweep),
        "How much of what sets the best trials apart each key explains. With few trials it is a guess.",
    )


def _noise(sweep: SweepHistory, found: list[Point]) -> str:
    name = sweep.objectives[0]
    if all(len(point.trials) < 2 for point in found):
        return _empty("One seed a point: what noise between seeds is can't be said. sweep.seeds=3 trains three each.")
    rows = [_noise_row(sweep, found[0], "best", "")]
    for one in differences(found[0], found, name):
        within = one.within_noise
        verdict = "one seed" if within is None else "within noise" if within else "differs"
        gap = f"{one.mean:+.4f}" + ("" if math.isnan(one.half) else f" ± {one.half:.4f}")
        rows.append(_noise_row(sweep, one.point, gap, verdict))
    head = "".join(
        f"<th{' class=text' if not at else ''}>{text}</th>"
        for at, text in enumerate(("point", "seeds", f"mean {escape(name)}", "minus the best", "verdict"))
    )
    note = (
        "Paired by seed, since points with the same seed see the same data: the mean difference and Student's 95 % "
        "interval of it. An interval that includes 0 is within seed noise. The best is the best of many, and the "
        "intervals are not corrected for the number of comparisons."
    )
    return f'<div class="card"><table class="sweep-table"><tr>{head}</tr>{"".join(rows)}</table></div>{_note(note)}'


def _noise_row(sweep: SweepHistory, point: Point, gap: str, verdict: str) -> str:
    mean, half = interval(point.values(sweep.objectives[0]))
    value = short(mean) + ("" if math.isnan(half) else f" ± {half:.4f}")
    cells = [str(len(point.trials)), value, gap, verdict]
    label = f"<td class=text>{escape(point_label(point.best, sweep.names))}</td>"
    return f"<tr>{label}{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _balance(sweep: SweepHistory, found: list[Point]) -> str:
    shown = found[: sweep_figures.CURVES]
    top = sweep_figures.highest(sweep, shown)
    charts = [
        _chart(point_label(point.best, sweep.names), figure, "", "small")
        for point in shown
        if (figure := sweep_figures.balance(sweep, point, top)) is not None
    ]
    if not charts:
        return _empty("No max_violation in the trials' metrics.jsonl.")
    more = f" The best {len(shown)} of {len(found)} points." if len(found) > len(shown) else ""
    note = _note(f"MaxVio by step (0 is even), a line a seed, all on one scale, the best point first.{more}")
    return f'<div class="grid-of-charts">{"".join(charts)}</div>{note}'


def _table(sweep: SweepHistory) -> str:
    complete = sweep.complete()
    ordered = [*complete, *(row for row in sweep.trials if row not in complete)][:ROWS]
    metrics = list(dict.fromkeys((*sweep.objectives, "val_loss", "max_violation")))
    heads = ["trial", *sweep.names, "seed", *metrics, "state", "minutes"]
    body = "".join(_table_row(row, sweep, metrics, best=bool(complete) and row is complete[0]) for row in ordered)
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    more = _note(f"The first {ROWS}; trials.csv has all.") if len(sweep.trials) > ROWS else ""
    return f'<div class="card"><table class="sweep-table"><tr>{head}</tr>{body}</table></div>{more}'


def _table_row(row: TrialRow, sweep: SweepHistory, metrics: list[str], *, best: bool) -> str:
    values = [value_label(row.params.get(name)) for name in sweep.names]
    told = [short(row.value(name)) for name in metrics]
    cells = [str(row.number), *values, str(row.seed), *told, row.state, f"{row.seconds / 60:.1f}"]
    title = f' title="{escape(row.error)}"' if row.error else ""
    mark = " class=best" if best else ""
    return f"<tr{mark}{title}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _chart(heading: str, figure: sweep_figures.Figure, note: str = "", size: str = "") -> str:
    data = json.dumps(figure, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<figure class="chart {size}"><figcaption><h3>{escape(heading)}</h3></figcaption>'
        f'<div class="plotly-chart" role="img" aria-label="{escape(heading)}"></div>'
        f'<script type="application/json">{data}</script>{_note(note) if note else ""}</figure>'
    )


def _section(key: str, heading: str, content: str) -> str:
    return f'<section aria-labelledby="h-{key}"><h2 id="h-{key}">{heading}</h2>\n{content}\n</section>\n'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _empty(text: str) -> str:
    return f'<p class="empty">{escape(text)}</p>'


def _plotly() -> str:
    """plotly's own script, as its package carries it."""
    return (resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
