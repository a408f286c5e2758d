"""The charts of a sweep's page, as plotly's JSON. A colour "@name" is the page's variable --name, in light and dark."""

from __future__ import annotations

import math
from typing import Any

from moe.report.scales import short
from moe.report.sweep_reader import SweepHistory, TrialRow, balance_curve, point_label, value_label
from moe.report.sweep_statistics import Point, effect, interval, pareto_front

Figure = dict[str, Any]
CURVES = 12  # small multiples
CURVE_POINTS = 200
LINES = ("@l0", "@l1", "@l2", "@l3", "@l4", "@l5")


def front(sweep: SweepHistory, found: list[Point]) -> Figure:
    """The first objective against the second (or MaxVio): a dot a point, its seeds' intervals, and the Pareto front."""
    x, y = second(sweep), sweep.objectives[0]
    drawn = [point for point in found if math.isfinite(point.mean(x)) and math.isfinite(point.mean(y))]
    best = pareto_front(drawn, [y, x], sweep.maximize)
    others = [point for point in drawn if point not in best]
    best.sort(key=lambda point: point.mean(x))
    line = {"mode": "lines+markers", "line": {"color": "@l1", "shape": "hv", "width": 1.5}}
    return _figure(
        [
            {**_dots(others, x, y, sweep), "name": "other points", "mode": "markers", "marker": _marker("@l0", 8)},
            {**_dots(best, x, y, sweep), "name": "Pareto front", **line, "marker": _marker("@l1", 10)},
        ],
        xaxis={"title": {"text": x}},
        yaxis={"title": {"text": y}},
        showlegend=True,
    )


def second(sweep: SweepHistory) -> str:
    """What the first objective is drawn against."""
    others = [name for name in (*sweep.objectives[1:], "max_violation", "val_loss") if name != sweep.objectives[0]]
    return others[0]


def _dots(found: list[Point], x: str, y: str, sweep: SweepHistory) -> Figure:
    def bars(name: str) -> Figure:
        halves = [interval(point.values(name))[1] for point in found]
        array = [0 if math.isnan(half) else half for half in halves]
        return {"type": "data", "array": array, "visible": any(array), "color": "@muted", "thickness": 1, "width": 3}

    return {
        "type": "scatter",
        "x": [point.mean(x) for point in found],
        "y": [point.mean(y) for point in found],
        "error_x": bars(x),
        "error_y": bars(y),
        "text": [point_label(point.best, sweep.names) for point in found],
        "hovertemplate": f"%{{text}}<br>{x} %{{x:.4g}}<br>{y} %{{y:.4f}}<extra></extra>",
    }


def parallel(sweep: SweepHistory) -> Figure:
    """A line a trial over the searched keys and the objectives, each axis from its lowest to its highest value.

    The best quarter by the first objective stands out.
    """
    rows = sweep.complete()
    axes = [*sweep.names, *dict.fromkeys((*sweep.objectives, second(sweep)))]
    places = {axis: _places(axis, rows, sweep) for axis in axes}
    axes = [axis for axis in axes if places[axis][0]]
    quarter = max(1, len(rows) // 4)
    traces = []
    for rank, row in reversed(list(enumerate(rows))):
        good = rank < quarter
        heights = [places[axis][0].get(row.number) for axis in axes]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": axes,
                "y": heights,
                "line": {"color": "@l1" if good else "@l0", "width": 2.2 if good else 1},
                "marker": {"size": 5 if good else 3},
                "opacity": 1 if good else 0.45,
                "text": [f"{axis} {value_label(_value(row, axis))}" for axis in axes],
                "hovertemplate": f"trial {row.number} · %{{text}}<extra></extra>",
            }
        )
    notes = [
        {
            "x": axis,
            "y": height,
            "text": text,
            "showarrow": False,
            "yshift": 12 if height else -12,
            "font": {"size": 11},
        }
        for axis in axes
        for height, text in zip((0, 1), places[axis][1], strict=True)
    ]
    ends = {"range": [-0.14, 1.14], "showticklabels": False, "zeroline": False, "showgrid": False}
    names = [axis.replace(".", "<br>.") for axis in axes]
    return _figure(
        traces,
        annotations=notes,
        yaxis=ends,
        xaxis={
            "tickvals": axes,
            "ticktext": names,
            "showgrid": True,
            "type": "category",
            "range": [-0.3, len(axes) - 0.7],
        },
        margin={"l": 14, "r": 14, "t": 14, "b": 56},
        hovermode="closest",
    )


def _value(row: TrialRow, axis: str) -> Any:
    return row.params[axis] if axis in row.params else row.value(axis)


def _places(axis: str, rows: list[TrialRow], sweep: SweepHistory) -> tuple[dict[int, float], tuple[str, str]]:
    """({trial: height in [0, 1]}, texts of the lowest and the highest value)."""
    values = {row.number: _value(row, axis) for row in rows}
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values.values()):
        finite = {number: float(value) for number, value in values.items() if math.isfinite(value)}
        if not finite:
            return {}, ("", "")
        low, high = min(finite.values()), max(finite.values())
        scale = math.log if axis in sweep.log else float
        span = scale(high) - scale(low) or 1.0
        texts = (short(low), short(high)) if high > low else (short(low), "")
        return {number: (scale(value) - scale(low)) / span for number, value in finite.items()}, texts
    kinds = list(dict.fromkeys(map(value_label, values.values())))
    last = max(1, len(kinds) - 1)
    heights = {number: kinds.index(value_label(value)) / last for number, value in values.items()}
    return heights, (kinds[0], kinds[-1] if len(kinds) > 1 else "")


def effects(sweep: SweepHistory, found: list[Point], key: str, name: str) -> Figure:
    """A dot a trial, and the points' mean with its 95 % interval for each value or bin of the searched key."""
    rows = sweep.complete()
    told = effect(found, key, name, log=key in sweep.log)
    number = all(isinstance(value, int | float) and not isinstance(value, bool) for value, *_ in told)
    x = [value if number else value_label(value) for value, *_ in told]
    dots = [row.params[key] if number else value_label(row.params[key]) for row in rows]
    halves = [0 if math.isnan(half) else half for *_, half in told]
    return _figure(
        [
            {
                "type": "scatter", "mode": "markers", "x": dots, "y": [row.value(name) for row in rows],
                "marker": _marker("@l0", 5), "opacity": 0.55, "hovertemplate": "%{x}: %{y:.4f}<extra></extra>",
            },
            {
                "type": "scatter", "mode": "markers+lines" if number else "markers", "x": x,
                "y": [mean for _, _, mean, _ in told], "marker": _marker("@l1", 9),
                "line": {"color": "@l1", "width": 1.5},
                "error_y": {"type": "data", "array": halves, "color": "@l1", "thickness": 1.5, "width": 5},
                "text": [f"{count} points" for _, count, *_ in told],
                "hovertemplate": "%{x}: mean %{y:.4f} (%{text})<extra></extra>",
            },
        ],
        xaxis=_scale(key, sweep) if number else {"type": "category"},
        yaxis={"title": {"text": name}},
    )  # fmt: skip


def _scale(key: str, sweep: SweepHistory) -> Figure:
    return (
        {"type": "log", "dtick": 1, "exponentformat": "power"} if key in sweep.log else {"type": "linear", "nticks": 5}
    )


def importance(sweep: SweepHistory) -> Figure:
    """Optuna's importance of each searched key, a bar an objective."""
    keys = list(dict.fromkeys(key for one in sweep.importance.values() for key in one))[::-1]
    return _figure(
        [
            {
                "type": "bar", "orientation": "h", "name": name, "y": keys, "x": [one.get(key, 0) for key in keys],
                "marker": {"color": LINES[index % len(LINES)]}, "hovertemplate": f"{name}: %{{x:.2f}}<extra></extra>",
            }
            for index, (name, one) in enumerate(sweep.importance.items())
        ],
        xaxis={"range": [0, 1], "title": {"text": "share of the difference"}},
        yaxis={"automargin": True},
        showlegend=len(sweep.importance) > 1,
        barmode="group",
    )  # fmt: skip


def balance(sweep: SweepHistory, point: Point, top: float) -> Figure | None:
    """MaxVio over the steps, a line a seed; None where the runs have none."""
    traces = []
    for index, row in enumerate(point.trials):
        steps, values = balance_curve(sweep.folder, row)
        every = max(1, len(steps) // CURVE_POINTS)
        if steps:
            averaged = [
                math.fsum(values[at : at + every]) / len(values[at : at + every]) for at in range(0, len(values), every)
            ]
            traces.append(
                {
                    "type": "scatter", "mode": "lines", "x": steps[::every], "y": averaged, "name": f"seed {row.seed}",
                    "line": {"color": LINES[index % len(LINES)], "width": 1.5},
                    "hovertemplate": f"seed {row.seed}, step %{{x}}: %{{y:.2f}}<extra></extra>",
                }
            )  # fmt: skip
    return _figure(traces, xaxis={"nticks": 4}, yaxis={"range": [0, top], "nticks": 4}) if traces else None


def highest(sweep: SweepHistory, found: list[Point]) -> float:
    """The axis's end that the small multiples share."""
    values = [value for point in found for row in point.trials for value in balance_curve(sweep.folder, row)[1]]
    return 1.05 * max(values, default=1.0)


def _marker(colour: str, size: int) -> Figure:
    return {"color": colour, "size": size}


def _figure(data: list[Figure], **layout: Any) -> Figure:
    axis = {"gridcolor": "@grid", "linecolor": "@hair", "zerolinecolor": "@grid", "tickfont": {"color": "@muted"}}
    merged = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "@ink", "size": 12, "family": "@sans"},
        "margin": {"l": 52, "r": 10, "t": 8, "b": 40},
        "showlegend": False,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hoverlabel": {"bgcolor": "@card", "bordercolor": "@hair", "font": {"color": "@ink"}},
        **layout,
        "xaxis": {**axis, "automargin": True, **layout.get("xaxis", {})},
        "yaxis": {**axis, **layout.get("yaxis", {})},
    }
    return {"data": data, "layout": merged}
