"""The page's charts as plotly figures (`data`, `layout`). Colours are names of page.css's variables, which page.js
replaces by the theme's; error bars are 95 % intervals (± 1.96 standard errors).

A figure that exists for each layer is a mapping from layer to figure.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from moe.analysis.assignment import Assignment
from moe.analysis.repetition import MEASURES, Repetition
from moe.analysis.result import Analysis

Z95 = 1.96
STYLES = 6  # line colours of page.css
Figure = dict[str, Any]


def figures(analysis: Analysis) -> dict[str, Figure]:
    """Name → figure, of all layers together."""
    found = {"information": information(analysis)}
    for measure in MEASURES:
        rows = [row for row in analysis.repetition if row.measure == measure and row.source is None]
        if rows:
            found[f"repetition-{measure.replace(' ', '-')}"] = repetition(rows)
    if analysis.leave_out is not None:
        found["worth"] = worth(analysis)
    return found


def layer_figures(analysis: Analysis) -> dict[str, dict[int, Figure]]:
    """Name → layer → figure."""
    found: dict[str, dict[int, Figure]] = {"assignment-all": {}, "assignment-first": {}}
    layers = analysis.shown_layers()
    for (layer, which), group in groupby(
        sorted(analysis.assignment, key=lambda row: (row.layer, row.which)), key=lambda row: (row.layer, row.which)
    ):
        if layer in layers:
            found[f"assignment-{which}"][layer] = assignment(list(group))
    for which in ("weights", "outputs"):
        found[f"similarity-{which}"] = {
            row.layer: _cosines(row.weights_EE if which == "weights" else row.outputs_EE)
            for row in analysis.similarity
            if row.layer in layers
        }
    if analysis.leave_out is not None:
        found["worth-of-layer"] = {layer: _worth_of_layer(analysis, layer) for layer in layers}
    return found


def assignment(rows: list[Assignment]) -> Figure:
    """One layer: a bar for each expert and source, 1/E, and ± 2 standard deviations of random routing around it."""
    experts = [str(expert) for expert in range(len(rows[0].shares_E))]
    bars = [
        {
            "type": "bar",
            "name": row.source,
            "x": experts,
            "y": [100 * share for share in row.shares_E],
            "error_y": _errors([100 * error for error in row.errors_E]),
            "marker": {"color": _colour(index)},
            "hovertemplate": "expert %{x}: %{y:.1f} %",
        }
        for index, row in enumerate(rows)
    ]
    even, spread = 100 * rows[0].uniform, 200 * max(row.random_error for row in rows if row.choices)
    band = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": even - spread, "y1": even + spread}
    return {
        "data": bars,
        "layout": {
            "barmode": "group",
            "xaxis": {"title": {"text": "expert"}, "type": "category"},
            "yaxis": {"title": {"text": "% of the source's choices"}, "rangemode": "tozero"},
            "shapes": [
                band | {"fillcolor": "var(--muted)", "opacity": 0.25, "line": {"width": 0}},
                _level(even),
            ],
        },
    }


def repetition(rows: list[Repetition]) -> Figure:
    """One measure by layer: observed, after shuffling, and of random sets."""
    layers = [str(row.layer) for row in rows]
    observed = _line("observed", layers, [100 * row.rate for row in rows], 0)
    observed["error_y"] = _errors([100 * row.error for row in rows])
    shuffled = _line("tokens shuffled", layers, [100 * row.shuffled for row in rows], 1)
    uniform = _line("random routing", layers, [100 * row.uniform for row in rows], 5)
    uniform["line"]["dash"] = "dash"
    return {
        "data": [observed, shuffled, uniform],
        "layout": {
            "xaxis": {"title": {"text": "layer"}, "type": "category"},
            "yaxis": {"title": {"text": "% of consecutive pairs"}, "rangemode": "tozero"},
        },
    }


def information(analysis: Analysis) -> Figure:
    """Corrected mutual information by layer as a share of the expert's entropy."""
    lines = []
    for index, about in enumerate(dict.fromkeys(row.about for row in analysis.information)):
        rows = [row for row in analysis.information if row.about == about]
        values = [100 * row.corrected / row.entropy if row.entropy else 0.0 for row in rows]
        line = _line(about, [str(row.layer) for row in rows], values, index)
        line["customdata"] = [[row.corrected, row.measured, row.by_chance, row.p] for row in rows]
        line["hovertemplate"] = (
            "layer %{x}: %{y:.1f} %, %{customdata[0]:.3f} bits (measured %{customdata[1]:.3f}, by chance "
            "%{customdata[2]:.3f}), p = %{customdata[3]:.3g}"
        )
        lines.append(line)
    return {
        "data": lines,
        "layout": {
            "xaxis": {"title": {"text": "layer"}, "type": "category"},
            "yaxis": {"title": {"text": "% of the expert's entropy"}, "rangemode": "tozero"},
        },
    }


def worth(analysis: Analysis) -> Figure:
    """Layer × expert: nats that leaving the expert out adds. Layers may have different numbers of experts."""
    assert analysis.leave_out is not None
    layers = [layer.layer for layer in analysis.observed.layers]
    most = max(layer.num_experts for layer in analysis.observed.layers)
    rise = {(row.layer, row.expert): row for row in analysis.leave_out.experts}
    rows = [[rise.get((layer, expert)) for expert in range(most)] for layer in layers]
    return {
        "data": [
            {
                "type": "heatmap",
                "x": [str(expert) for expert in range(most)],
                "y": [str(layer) for layer in layers],
                "z": [[None if row is None else row.rise for row in line] for line in rows],
                "customdata": [
                    [None if row is None else [row.error, 100 * row.share] for row in line] for line in rows
                ],
                "zmid": 0,
                "hoverongaps": False,
                "hovertemplate": "layer %{y}, expert %{x}: %{z:.4f} ± %{customdata[0]:.4f} nats, "
                "%{customdata[1]:.1f} % of choices<extra></extra>",
                "colorscale": "diverging",
                "colorbar": {"title": {"text": "nats"}, "thickness": 12},
            }
        ],
        "layout": {
            "xaxis": {"title": {"text": "expert"}, "type": "category"},
            "yaxis": {"title": {"text": "layer"}, "type": "category", "autorange": "reversed"},
        },
    }


def _worth_of_layer(analysis: Analysis, layer: int) -> Figure:
    """One layer: a bar for each expert and source."""
    assert analysis.leave_out is not None
    rows = [row for row in analysis.leave_out.experts if row.layer == layer]
    experts = [str(row.expert) for row in rows]
    bars = []
    for index, name in enumerate(analysis.observed.source_names):
        pairs = [row.by_source[name] for row in rows]
        bars.append(
            {
                "type": "bar",
                "name": name,
                "x": experts,
                "y": [rise for rise, _ in pairs],
                "error_y": _errors([error for _, error in pairs]),
                "marker": {"color": _colour(index)},
                "hovertemplate": "expert %{x}: %{y:.4f} nats",
            }
        )
    return {
        "data": bars,
        "layout": {
            "barmode": "group",
            "xaxis": {"title": {"text": "expert"}, "type": "category"},
            "yaxis": {"title": {"text": "nats per token"}},
        },
    }


def _cosines(cosines_EE: list[list[float]]) -> Figure:
    """Experts with themselves are left blank: they are 1, and would hide the others."""
    experts = [str(expert) for expert in range(len(cosines_EE))]
    shown = [[None if one == other else value for other, value in enumerate(row)] for one, row in enumerate(cosines_EE)]
    largest = max((abs(value) for row in shown for value in row if value is not None), default=0.0)
    return {
        "data": [
            {
                "type": "heatmap",
                "x": experts,
                "y": experts,
                "z": shown,
                "zmin": -largest,
                "zmax": largest,
                "hoverongaps": False,
                "hovertemplate": "experts %{x} and %{y}: %{z:.3f}<extra></extra>",
                "colorscale": "diverging",
                "colorbar": {"title": {"text": "cosine"}, "thickness": 12},
            }
        ],
        "layout": {
            "xaxis": {"title": {"text": "expert"}, "type": "category"},
            "yaxis": {"title": {"text": "expert"}, "type": "category", "autorange": "reversed"},
        },
    }


def _line(name: str, x: list[str], y: list[float], style: int) -> Figure:
    colour = _colour(style)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": x,
        "y": y,
        "line": {"color": colour, "width": 2},
        "marker": {"color": colour, "size": 6},
        "hovertemplate": "layer %{x}: %{y:.1f} %",
    }


def _level(value: float) -> Figure:
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value}
    return line | {"line": {"color": "var(--muted)", "width": 1.5, "dash": "dash"}}


def _errors(errors: list[float]) -> Figure:
    bars = {"type": "data", "array": [Z95 * error for error in errors], "thickness": 1.2, "width": 2}
    return bars | {"color": "var(--ink)"}


def _colour(index: int) -> str:
    return f"var(--l{index % STYLES})"
