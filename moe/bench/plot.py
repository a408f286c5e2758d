"""Benchmarks' results as one SVG, drawn from their JSON alone: ratios as bars around 1, losses against seconds.

A ratio is a figure whose line says so (`is_ratio`). A table whose first column is `SECONDS` becomes a chart with a line
for each other column. All else that was measured stays in the tables.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from moe.bench.results import SECONDS, stated
from moe.bench.svg import HAIR, LINE, LINES, MUTED, WIDTH, Drawing, printable, width, wrapped
from moe.report.palette import INK_LIGHT
from moe.report.plots import Axis
from moe.report.scales import linear_ticks, log_ticks, tick_label

# Ratios of memory, work and time to those of a reference; of all other ratios more is better.
LESS_IS_BETTER = ("ratio peak memory {}", "ratio multiply-adds per token {}", "ratio time per token {}")
MORE, LESS = LINES[0], LINES[1]  # the bars' colours
EDGE = 20  # around everything
LABELS = 330  # the bars' labels, to the left
VALUES = 90  # the bars' values, to the right
BAR = 14
CHART = 300  # a chart's height without its title and axis
NAMES = 226  # the lines' names, to the right
DASHES = ("", "6 4", "2 3")  # of as many lines as there are colours
EMPTY = "No ratio and no loss against seconds has been measured yet."


@dataclass(slots=True)
class Curve:
    """A side's points, (seconds, nats)."""

    name: str
    points: list[tuple[float, float]]


@dataclass(slots=True)
class Shown:
    """What is drawn of one benchmark: `ratios` are figures, `charts` are {title: curves}."""

    title: str
    ratios: dict[str, float]
    charts: dict[str, list[Curve]]


def shown(titled: dict[str, Any]) -> list[Shown]:
    """`titled` has `Results.values` by benchmark, None of one that failed."""
    found = []
    for title, results in titled.items():
        if results is None:
            continue
        ratios = {line: value for line, value in results["figures"].items() if is_ratio(line)}
        charts = {each["title"]: _curves(each) for each in results["tables"] if each["columns"][0] == SECONDS}
        found.append(Shown(title, ratios, {name: curves for name, curves in charts.items() if curves}))
    return [one for one in found if one.ratios or one.charts]


def is_ratio(line: str) -> bool:
    """Whether a line of `Results.figures` is of a ratio, which is 1 where both sides are alike."""
    return line.startswith("ratio ") or "÷" in line


def _curves(table: dict[str, Any]) -> list[Curve]:
    seconds = [row[0] for row in table["rows"]]
    curves = []
    for column, name in enumerate(table["columns"][1:], start=1):
        losses = [row[column] for row in table["rows"]]
        points = [(clock, loss) for clock, loss in zip(seconds, losses, strict=True) if loss is not None]
        if points:
            curves.append(Curve(name, points))
    return curves


def summary(titled: dict[str, Any]) -> str:
    """All that the plot shows as one line: the alternative text."""
    parts = []
    for one in shown(titled):
        said = list(stated(one.ratios))
        for curves in one.charts.values():
            said += [f"{each.name}: {each.points[-1][1]:.2f} nats after {each.points[-1][0]:.0f} s" for each in curves]
        parts.append(f"{one.title}: {'; '.join(said)}")
    return printable(f"{'. '.join(parts)}." if parts else EMPTY)


def embedded(titled: dict[str, Any], link: str) -> str:
    """The plot as an image of Markdown, whatever characters its alternative text has; `link` is percent-encoded."""
    alternative = re.sub(r"([\\`*\[\]<>&~$|])", r"\\\1", summary(titled))
    return f"![{alternative}]({link})"


def plot(titled: dict[str, Any], subtitle: str = "") -> str:
    """The SVG's text."""
    drawing, found, y = Drawing(), shown(titled), float(EDGE)
    ratios = [one for one in found if one.ratios]
    if ratios:
        y = _bars(drawing, ratios, y, subtitle)
    for one in found:
        for title, curves in one.charts.items():
            y = _chart(drawing, f"{one.title}: {title}", curves, y)
    if not found:
        y = _heading(drawing, EMPTY, y, subtitle)
    return drawing.document(y, "Benchmarks", summary(titled))


def _heading(drawing: Drawing, title: str, y: float, subtitle: str = "") -> float:
    """Returns where it ends, as all that draws from a height `y` on."""
    for text, fill, style in ((title, INK_LIGHT, "bold"), (subtitle, MUTED, "")):
        for line in wrapped(text, 0.9 * (WIDTH - 2 * EDGE)) if text else ():  # bold letters are wider
            drawing.text(EDGE, y + LINE / 2, line, fill, style)
            y += LINE
    return y + 10


def _bars(drawing: Drawing, found: list[Shown], y: float, subtitle: str) -> float:
    """Bars from 1 to each ratio on a logarithmic axis, under their benchmarks' titles."""
    y = _heading(drawing, "Ratios: 1 where both sides are alike (logarithmic axis)", y, subtitle)
    y = _legend(drawing, [line for one in found for line in one.ratios], y)
    axis = _ratio_axis([value for one in found for value in one.ratios.values() if _drawable(value)])
    left, right = EDGE + LABELS, WIDTH - EDGE - VALUES
    top, bars = y, list[tuple[float, str, float]]()
    for one in found:
        for line in wrapped(one.title, LABELS - 12):
            drawing.text(EDGE, y + LINE / 2, line)
            y += LINE
        for name, value in one.ratios.items():
            bars.append((y + LINE / 2, name, value))
            for line in wrapped(re.sub(r":? *\{\}", "", name), LABELS - 26):
                drawing.text(EDGE + 14, y + LINE / 2, line, MUTED)
                y += LINE
            y += 4
        y += 6

    def place(value: float) -> float:
        return left + (right - left) * axis.place(value)

    for tick in axis.ticks:
        drawing.line([(place(tick), top), (place(tick), y)], MUTED if tick == 1 else HAIR, 1.5 if tick == 1 else 1)
        drawing.text(place(tick), y + LINE / 2 + 2, f"{tick:g}", MUTED, "middle")
    for middle, name, value in bars:
        low, high = sorted((place(1), place(value) if _drawable(value) else place(1)))
        drawing.rectangle(low, middle - BAR / 2, high - low, BAR, LESS if name in LESS_IS_BETTER else MORE)
        drawing.text(high + 8, middle, f"{value:.2f}", style="bold")
    return y + LINE + EDGE


def _legend(drawing: Drawing, lines: list[str], y: float) -> float:
    x = float(EDGE)
    kinds = {"less is better": LESS} if set(lines) <= set(LESS_IS_BETTER) else {"more is better": MORE}
    if set(lines) & set(LESS_IS_BETTER):
        kinds["less is better"] = LESS
    for name, colour in kinds.items():
        drawing.rectangle(x, y + LINE / 2 - BAR / 2, BAR, BAR, colour)
        drawing.text(x + BAR + 8, y + LINE / 2, name, MUTED)
        x += BAR + 8 + width(name) + 24
    return y + LINE + 12


def _drawable(value: float) -> bool:
    return value > 0 and math.isfinite(value)


def _ratio_axis(values: list[float]) -> Axis:
    """Around 1, which is one of its ticks."""
    low, high = min(0.5, *values, 1) / 1.1, max(2, *values, 1) * 1.1
    room = 0.1 * math.log(high / low)
    others = [tick for tick in log_ticks(low, high) if abs(math.log(tick)) > room]
    return Axis(low, high, sorted([1, *others]), log=True)


def _chart(drawing: Drawing, title: str, curves: list[Curve], y: float) -> float:
    """Lines with their names at their ends."""
    top = _heading(drawing, title, y)
    left, right = EDGE + 50, WIDTH - EDGE - NAMES
    names = [wrapped(f"{one.name} {one.points[-1][1]:.2f}", NAMES - 28) for one in curves]
    bottom = top + max(CHART, LINE * sum(map(len, names)) + 6 * len(names))
    points = [point for one in curves for point in one.points]
    seconds, losses = Axis(0, max(clock for clock, _ in points) or 1, []), _loss_axis([loss for _, loss in points])

    def place(clock: float, loss: float) -> tuple[float, float]:
        return left + (right - left) * seconds.place(clock), bottom - (bottom - top) * losses.place(loss)

    for tick in losses.ticks:
        height = place(0, tick)[1]
        drawing.line([(left, height), (right, height)], HAIR)
        drawing.text(left - 8, height, tick_label(tick, losses.ticks), MUTED, "end")
    ticks = linear_ticks(0, seconds.high, 6)
    for tick in ticks:
        across = place(tick, losses.low)[0]
        drawing.line([(across, bottom), (across, bottom + 5)], MUTED)
        drawing.text(across, bottom + 5 + LINE / 2, tick_label(tick, ticks), MUTED, "middle")
    drawing.line([(left, bottom), (right, bottom)], MUTED)
    drawing.text(right + 30, bottom + 5 + LINE / 2, "seconds of training", MUTED)
    ends = [place(*one.points[-1])[1] for one in curves]
    heights = [LINE * len(lines) + 6.0 for lines in names]
    for index, (one, middle) in enumerate(zip(curves, spread_out(ends, heights, top, bottom), strict=True)):
        colour, dash = LINES[index % len(LINES)], DASHES[index // len(LINES) % len(DASHES)]
        drawing.line([place(*point) for point in one.points], colour, 2, dash)
        for point in one.points:
            drawing.dot(*place(*point), colour)
        drawing.line([place(*one.points[-1]), (right + 24, middle)], colour)
        for number, line in enumerate(names[index]):
            drawing.text(right + 28, middle + LINE * (number - (len(names[index]) - 1) / 2), line, colour)
    return bottom + 2 * LINE + EDGE


def _loss_axis(losses: list[float]) -> Axis:
    low, high = min(losses), max(losses)
    margin = 0.05 * (high - low) or 0.5
    low, high = low - margin, high + margin
    return Axis(low, high, linear_ticks(low, high))


def spread_out(wanted: list[float], heights: list[float], top: float, bottom: float) -> list[float]:
    """Middles of labels of these heights, near those wanted, in their order, without overlap. All must fit between
    `top` and `bottom`."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    middles, free = list(wanted), top
    for index in order:
        middles[index] = max(middles[index], free + heights[index] / 2)
        free = middles[index] + heights[index] / 2
    free = bottom
    for index in reversed(order):
        middles[index] = min(middles[index], free - heights[index] / 2)
        free = middles[index] - heights[index] / 2
    return middles
