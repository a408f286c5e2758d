"""What a run said about single experts: alarms, the newest value of each, and which serve the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from moe.errors import UserError
from moe.report.scales import short
from moe.untrusted import is_real, read_object

ALARMS_SHOWN = 20
CELLS = 4096  # of a table; a larger one is in metrics.jsonl only
PAIRS_SHOWN = 5  # of each layer
FIX = "remove it: the next evaluation writes it anew"
SHARES = "expert_shares"  # has a figure of its own


@dataclass(slots=True)
class Details:
    """`take` each line of metrics.jsonl. `alarms` by step; `matrices` by name: step and [L][E], None where unknown;
    `coactivation`: step and [L][E][E]."""

    alarms: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    matrices: dict[str, tuple[int, list[list[float | None]]]] = field(default_factory=dict)
    coactivation: tuple[int | None, list[np.ndarray]] | None = None

    def take(self, step: int, line: dict[str, Any]) -> None:
        self.alarms.pop(step, None)
        if isinstance(line.get("new_alarms"), list):
            self.alarms[step] = [one for one in line["new_alarms"] if isinstance(one, dict)]
        for name, value in line.items():
            if name != SHARES and _is_matrix(value):
                self.matrices[name] = step, value


def _is_matrix(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, list) and row for row in value)
        and all(x is None or is_real(x) for row in value for x in row)
    )


def read_coactivation(path: Path) -> tuple[int | None, list[np.ndarray]] | None:
    """coactivation.json; None if the run has written none. Raises UserError where it can't be read."""
    if not path.exists():
        return None
    data = read_object(path, FIX).values
    try:
        layers = [np.array(layer, dtype=float) for layer in data["layers"]]
        if any(layer.ndim != 2 or layer.shape[0] != layer.shape[1] for layer in layers):
            raise ValueError("not square")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: layers must be a square of numbers a layer ({error}); {FIX}") from error
    step = data.get("step")
    return (step if type(step) is int else None), layers


def alarms(details: Details) -> str:
    """A list of the alarms, the first one first; empty without any."""
    found = [(step, one) for step in sorted(details.alarms) for one in details.alarms[step]]
    if not found:
        return ""
    items = "".join(f"<li>{_alarm(step, one)}</li>" for step, one in found[:ALARMS_SHOWN])
    more = f"<li>and {len(found) - ALARMS_SHOWN:,} more in metrics.jsonl</li>" if len(found) > ALARMS_SHOWN else ""
    return f'<div class="alarms" role="status"><h3>Collapse alarms</h3><ul>{items}{more}</ul></div>'


def _alarm(step: int, one: dict[str, Any]) -> str:
    value = one.get("value")
    shown = short(float(value)) if value is not None and is_real(value) else "not finite"
    where = f"layer {one.get('layer')}" + ("" if one.get("expert") is None else f", expert {one['expert']}")
    what = f"{one.get('metric')} {shown}, since step {one.get('since')}"
    return f"Step {step:,}: <b>{escape(where)}</b>, {escape(what)}"


def tables(details: Details, layers: Callable[[int], Sequence[int]]) -> str:
    """A folded table, layer × expert, for each metric of single experts; and the pairs that serve the same tokens.
    `layers(L)` are the numbers of L layers in the model."""
    found = [_table(name, step, rows, layers(len(rows))) for name, (step, rows) in details.matrices.items()]
    return "".join(found) + _pairs(details.coactivation, layers)


def _table(name: str, step: int, rows: list[list[float | None]], layers: Sequence[int]) -> str:
    title = escape(name.replace("_", " ").capitalize())
    if sum(map(len, rows)) > CELLS:
        return f'<p class="note">{title}: {sum(map(len, rows)):,} numbers, see metrics.jsonl.</p>'
    head = "".join(f'<th scope="col">{expert}</th>' for expert in range(max(map(len, rows))))
    body = "".join(
        f'<tr><th scope="row">{layer}</th>'
        + "".join(f"<td>{'–' if value is None else short(value)}</td>" for value in row)
        + "</tr>"
        for layer, row in zip(layers, rows, strict=True)
    )
    return (
        f"<details><summary>{title}, step {step:,}</summary>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title} by layer and expert">'
        '<table class="numbers">'
        f'<thead><tr><th scope="col">layer</th>{head}</tr></thead><tbody>{body}</tbody></table></div></details>'
    )


def _pairs(found: tuple[int | None, list[np.ndarray]] | None, layers: Callable[[int], Sequence[int]]) -> str:
    if found is None or not any(np.isfinite(lift_EE).any() for lift_EE in found[1]):
        return ""
    step, lifts_LEE = found
    rows = ""
    for layer, lift_EE in zip(layers(len(lifts_LEE)), lifts_LEE, strict=True):
        lifts = np.where(np.tril(np.ones_like(lift_EE), 0) > 0, -math.inf, np.nan_to_num(lift_EE, nan=-math.inf))
        order = np.argsort(lifts, axis=None)[::-1][:PAIRS_SHOWN]
        best = [(int(place) // len(lifts), int(place) % len(lifts)) for place in order]
        cells = "".join(
            f"<td>{one} + {other}: {lifts[one, other]:.2f}</td>" for one, other in best if lifts[one, other] > 0
        )
        rows += f'<tr><th scope="row">{layer}</th>{cells}</tr>'
    at = f", step {step:,}" if step is not None else ""
    return (
        f"<details><summary>Experts that serve the same tokens{at}</summary>"
        '<p class="note">Pairs that meet more often than independent choices would: 2.00 is twice as often.</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="Pairs of experts by layer"><table class="numbers">'
        f"<tbody>{rows}</tbody></table></div></details>"
    )
