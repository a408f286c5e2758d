"""Charts as HTML, drawn without a plotting library.

A curve is an SVG that stretches with the page (strokes keep their width); the text around it is HTML, so that it stays
readable on a phone. page.js reads the numbers stored beside each chart and shows them at the pointer and by arrow keys.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from moe.report.scales import Points, linear_ticks, log_ticks, nice_step, short, tick_label

SIZE = 1000  # the SVG's own units, along both axes
EDGE = 0.97  # a centred label this far right would stick out of its card
SPIKY = 30  # a curve whose maximum is this many times its median is drawn on a logarithmic axis


@dataclass(slots=True)
class Series:
    name: str
    points: Points
    style: str = "s0"  # a class of page.css: colour and dash
    dots: bool = False  # mark each point: for values that not every step has


@dataclass(slots=True)
class Reference:
    """A horizontal line at a value to compare with."""

    name: str
    value: float


@dataclass(slots=True)
class Chart:
    """`note` is a sentence under the title; the value axis includes `floor` (0 for a count or a share)."""

    title: str
    unit: str
    series: list[Series]
    references: list[Reference] = field(default_factory=list)
    note: str = ""
    floor: float | None = None
    span: tuple[int, int] | None = None  # steps the axis shows (default: those of the series)
    least_span: float = 0.0  # the axis spans at least this, so that noise on a constant looks flat
    percent: bool = False
    integer: bool = False
    may_log: bool = False
    tall: bool = False


@dataclass(slots=True)
class Axis:
    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def value_axis(chart: Chart) -> Axis:
    bounds = [finite(bound) for one in chart.series for bound in (one.points.low, one.points.high)]
    everything = np.concatenate([*bounds, [line.value for line in chart.references]])
    low, high = float(everything.min()), float(everything.max())
    middle = float(np.median(np.concatenate([finite(one.points.values) for one in chart.series])))
    if chart.may_log and low > 0 and high > SPIKY * middle:
        low, high = low / 1.1, high * 1.1
        ticks = log_ticks(low, high)
        if len(ticks) > 1:
            return Axis(low, high, ticks, log=True)
    if chart.floor is not None:
        low, high = min(low, chart.floor), max(high, chart.floor)
    missing = max(chart.least_span, 0.02 * abs(high), 1e-12) - (high - low)
    if missing > 0:
        up = missing if chart.floor == low else missing / 2
        low, high = low - (missing - up), high + up
    step = nice_step(high - low, 5)
    if chart.integer:
        step = max(1.0, round(step))
    margin = 0.04 * (high - low)
    bottom = low if chart.floor == low else low - margin
    top = max(high + margin, bottom + step)
    return Axis(bottom, top, linear_ticks(bottom, top, integer=chart.integer))


def step_axis(chart: Chart) -> Axis:
    steps = np.concatenate([chart.span or [], *(one.points.steps for one in chart.series)])
    low, high = float(steps.min()), float(steps.max())
    if low == high:
        low, high = low - 1, high + 1
    return Axis(low, high, linear_ticks(low, high, 6, integer=True))


def _path(points: Points, x: Axis, y: Axis) -> str:
    """The curve, with gaps at values that aren't finite."""
    parts, pen = [], "M"
    for step, value in zip(points.steps, points.values, strict=True):
        if not math.isfinite(value):
            pen = "M"
            continue
        parts.append(f"{pen}{_at(x, step)} {_at(y, value, flip=True)}")
        pen = "L"
    return "".join(parts)


def _band(points: Points, x: Axis, y: Axis) -> str:
    """The area between the lowest and highest values of each point's steps."""
    keep = np.isfinite(points.values)
    steps = points.steps[keep]
    there = [f"{_at(x, step)} {_at(y, value, flip=True)}" for step, value in zip(steps, points.high[keep], strict=True)]
    back = [f"{_at(x, step)} {_at(y, value, flip=True)}" for step, value in zip(steps, points.low[keep], strict=True)]
    return f"M{'L'.join(there + back[::-1])}Z"


def _at(axis: Axis, value: float, *, flip: bool = False) -> str:
    share = axis.place(float(value))
    return f"{SIZE * (1 - share if flip else share):.1f}".removesuffix(".0")


def _dot_path(points: Points, x: Axis, y: Axis) -> str:
    """Zero-length strokes, which stay round when the SVG stretches; a circle would become an ellipse."""
    pairs = zip(points.steps, points.values, strict=True)
    return "".join(f"M{_at(x, s)} {_at(y, v, flip=True)}h0" for s, v in pairs if math.isfinite(v))


def _summary(chart: Chart, scale: float) -> str:
    """The text for readers who can't see the curve: each series' start, end and extremes."""
    parts = []
    for one in chart.series:
        values = finite(one.points.values) * scale
        low, high = finite(one.points.low).min() * scale, finite(one.points.high).max() * scale
        parts.append(
            f"{one.name}: from {short(values[0])} at step {one.points.steps[0]} to {short(values[-1])} at step "
            f"{one.points.steps[-1]}, lowest {short(low)}, highest {short(high)}."
        )
    parts += [f"Line: {line.name} {short(line.value * scale)}." for line in chart.references]
    return " ".join(parts)


def line_chart(chart: Chart, key: str) -> str:
    """A figure with HTML id `key`, which must be unique on the page; '' if no series has a finite value."""
    chart.series = [one for one in chart.series if not one.points.empty]
    if not chart.series:
        return ""
    x, y = step_axis(chart), value_axis(chart)
    scale, unit = (100.0, "%") if chart.percent else (1.0, chart.unit)
    ticks = [tick * scale for tick in y.ticks]
    grid = "".join(f'<path class="grid" d="M0 {_at(y, tick, flip=True)}H{SIZE}"/>' for tick in y.ticks)
    drawing, legend = [grid], []
    for line in chart.references:
        drawing.append(f'<path class="reference" d="M0 {_at(y, line.value, flip=True)}H{SIZE}"/>')
        legend.append(f'<li><i class="key reference"></i>{escape(line.name)} {escape(short(line.value * scale))}</li>')
    for one in chart.series:
        if one.points.stride > 1:
            drawing.append(f'<path class="band {one.style}" d="{_band(one.points, x, y)}"/>')
        drawing.append(f'<path class="line {one.style}" d="{_path(one.points, x, y)}"/>')
        if one.dots or np.isfinite(one.points.values).sum() == 1:
            drawing.append(f'<path class="dots {one.style}" d="{_dot_path(one.points, x, y)}"/>')
    if len(chart.series) + len(chart.references) > 1:
        legend = [f'<li><i class="key {one.style}"></i>{escape(one.name)}</li>' for one in chart.series] + legend
    note = chart.note + (" Logarithmic axis." if y.log else "")
    labels = "".join(
        f'<span style="top:{100 * (1 - y.place(tick)):.2f}%">{escape(tick_label(tick * scale, ticks))}</span>'
        for tick in y.ticks
    )
    below = "".join(
        f'<span{" class=edge" if x.place(tick) > EDGE else ""} style="left:{100 * x.place(tick):.2f}%">'
        f"{escape(tick_label(tick, x.ticks))}</span>"
        for tick in x.ticks
    )
    title = escape(chart.title)
    return f"""<figure class="chart{" tall" if chart.tall else ""}" id="{key}">
<figcaption><h3>{title}</h3> <span class="unit">{escape(unit)}</span>
{f'<p class="note">{escape(note.strip())}</p>' if note.strip() else ""}</figcaption>
{f'<ul class="legend">{"".join(legend)}</ul>' if legend else ""}
<div class="plot"><div class="yaxis" aria-hidden="true">{labels}</div>
<div class="canvas" tabindex="0" role="group" aria-label="{title}: left and right arrow keys read the values">
<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" role="img" aria-labelledby="{key}-t {key}-d">
<title id="{key}-t">{title} ({escape(unit)}) by optimizer step</title>
<desc id="{key}-d">{escape(_summary(chart, scale))}</desc>
{"".join(drawing)}</svg></div>
<div class="xaxis" aria-hidden="true">{below}<b>step</b></div></div>
<script type="application/json">{embed(_readout(chart, x, y, scale))}</script>
</figure>"""


def _readout(chart: Chart, x: Axis, y: Axis, scale: float) -> dict[str, Any]:
    """The numbers that page.js shows at the pointer: each series' steps, values, and heights in the chart (0–1)."""
    series = []
    for one in chart.series:
        keep = np.isfinite(one.points.values)
        values = one.points.values[keep]
        series.append(
            {
                "name": one.name,
                "style": one.style,
                "steps": one.points.steps[keep].tolist(),
                "text": [short(value * scale) for value in values.tolist()],
                "y": [round(y.place(value), 4) for value in values.tolist()],
            }
        )
    return {"x": [x.low, x.high], "unit": "%" if chart.percent else "", "series": series}


def embed(value: Any) -> str:
    """JSON that is safe inside <script>: no text of a run can close the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
