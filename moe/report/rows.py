"""Reads metrics.jsonl: one row a step, checked.

A torn line (the process was killed while it wrote) is skipped and counted; a step that was trained again after a
resume counts once, with its last line. A value of another type than the run writes is an error that names line and key.
For long runs memory is bounded: expert shares are read for a few steps only.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe.config import AnswerMetric
from moe.errors import UserError
from moe.untrusted import Values, is_gap, is_real, json_lines, open_regular, shown

ANSWERS = tuple(metric.name for metric in AnswerMetric)
SCALARS = (
    "tokens",
    "lm_loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "max_violation",
    "dead_experts",
    "dropped_fraction",
    "val_loss",
    "val_bits_per_byte",
    "val_unigram_entropy",
    *ANSWERS,
)
LAYERS = "_layers"  # a number NAME beside a list NAME_layers is what the routers measured
WITHOUT_LAYERS = ("router_z_loss", "router_entropy")  # the same in earlier runs
HIGHEST_LAYER = "_highest_layer"
MOST_COLUMNS = 1000  # of all steps together
FRAME_NUMBERS = 60_000  # expert shares kept for the heatmap's slider, over all its steps
FRAMES = 60
FIX = "remove the line"


@dataclass(slots=True)
class Row:
    """One step. `shares` are (layers, experts) of its expert shares; `offset` is the byte where its line starts."""

    scalars: array[float]  # of the columns known when it was read
    by_source: dict[str, float] | None
    shares: tuple[int, int] | None
    offset: int


def read_rows(
    path: Path, run_dir: Path, take: Callable[[int, dict[str, Any]], None]
) -> tuple[dict[int, Row], list[str], int, int]:
    """(rows by step, names of their scalars, torn lines, repeated steps); `take` gets each step and its line.

    Raises UserError.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; train first: `moe train run_dir={run_dir}`")
    rows: dict[int, Row] = {}
    columns = {name: None for name in SCALARS}  # ordered
    torn = repeated = lines = 0
    for line in json_lines(path):
        lines += 1
        if line.value is None:
            torn += 1
            continue
        values = Values(line.value, f"{path}:{line.number}", FIX)
        step = values.count("step")
        repeated += step in rows
        take(step, line.value)
        measured = _router_metrics(values)
        columns |= dict.fromkeys(measured)
        if len(columns) > MOST_COLUMNS:
            raise UserError(f"{values.where}: this and earlier lines name more than {MOST_COLUMNS} metrics; {FIX}")
        rows[step] = Row(
            scalars=array("d", (measured[key] if key in measured else _number(values, key) for key in columns)),
            by_source=_by_source(values),
            shares=_shape(values),
            offset=line.offset,
        )
    if not rows:
        found = "is empty" if not lines else f"holds no step in its {lines} line{'s' * (lines > 1)}"
        raise UserError(f"{path}: {found}; train at least one step: `moe train run_dir={run_dir}`")
    return rows, list(columns), torn, repeated


def _number(values: Values, key: str) -> float:
    """NaN for a number that is missing or was not finite."""
    return _checked(values, key, values.values.get(key))


def _checked(values: Values, key: str, value: Any) -> float:
    if is_gap(value):
        return math.nan
    if not is_real(value):
        raise UserError(f"{values.where}: {key}={shown(value)} must be a number or null; {FIX}")
    return float(value)


def _list(values: Values, key: str) -> list[Any]:
    found = values.values.get(key) or []
    if not isinstance(found, list):
        raise UserError(f"{values.where}: {key}={shown(found)} must be a list; {FIX}")
    return found


def _router_metrics(values: Values) -> dict[str, float]:
    """Each loss and diagnostic of the routers, and its highest layer's (NaN where the run wrote none)."""
    line = values.values
    measured: dict[str, float] = {}
    for name in line:
        if name in WITHOUT_LAYERS or name + LAYERS in line:
            layers = [_checked(values, name + LAYERS, value) for value in _list(values, name + LAYERS)]
            known = [value for value in layers if not math.isnan(value)]
            measured |= {name: _number(values, name), name + HIGHEST_LAYER: max(known, default=math.nan)}
    return measured


def _by_source(values: Values) -> dict[str, float] | None:
    if values.values.get("val_loss_by_source") is None:
        return None
    losses = values.object("val_loss_by_source")
    return {name: _checked(losses, f"val_loss_by_source.{name}", value) for name, value in losses.values.items()}


def _shape(values: Values) -> tuple[int, int] | None:
    """(layers, experts) of the expert shares; None where there are none, or not all are finite."""
    shares = _list(values, "expert_shares")
    widths = {len(layer) if isinstance(layer, list) else -1 for layer in shares}
    if not shares or widths == {0}:
        return None
    if len(widths) != 1 or widths == {-1}:
        raise UserError(f"{values.where}: expert_shares must be one list a layer, of equal length; {FIX}")
    numbers = [_checked(values, "expert_shares", value) for layer in shares for value in layer]
    if not all(math.isnan(number) or 0 <= number <= 1 for number in numbers):
        raise UserError(f"{values.where}: expert_shares must be from 0 to 1; {FIX}")
    return None if any(map(math.isnan, numbers)) else (len(shares), widths.pop())


def read_frames(path: Path, rows: list[tuple[int, Row]]) -> tuple[list[int], list[list[list[float]]]]:
    """Expert shares at evenly spaced steps, first and last among them; as many as fit FRAME_NUMBERS."""
    if not rows:
        return [], []
    shape = rows[-1][1].shares
    assert shape is not None
    rows = [row for row in rows if row[1].shares == shape]
    count = min(FRAMES, len(rows), max(1, FRAME_NUMBERS // (shape[0] * shape[1])))
    picked = np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int)) if count > 1 else [len(rows) - 1]
    steps, frames = [], []
    with open_regular(path) as file:
        for index in picked:
            step, row = rows[index]
            file.seek(row.offset)
            steps.append(step)
            frames.append(json.loads(file.readline())["expert_shares"])
    return steps, frames
