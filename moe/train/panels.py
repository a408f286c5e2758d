"""Which section and which kind of panel each metric gets in W&B.

The names and shapes of a step's metrics decide, so that a router's new loss or diagnostic needs no entry here:

    a number                      SECTION/NAME, every step
    {name: number}                SECTION/NAME/name, every step
    [number of each layer]        layers/NAME_00 …, by the layers' numbers in the model, every `tracking.detail_every`
                                  steps; of pairs of neighbouring layers, by the first one's
    [[of each layer's experts]]   experts/NAME: a histogram over all of them, and experts/NAME_heatmap: layer × expert;
                                  every `tracking.detail_every` steps

W&B shows sections in alphabetical order: balance, experts, layers, samples, speed, train, val. A number that is neither
the training loop's nor an evaluation's is a router's and belongs to "balance".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe.config import AnswerMetric

TRAIN = ("loss", "lm_loss", "grad_norm", "lr", "skipped_steps", "tokens")
SPEED = ("tokens_per_second", "step_seconds", "mfu", "data_wait", "straggler_seconds", "elapsed")
UNSHOWN = ("step", "time", "slowest_rank")  # W&B has the first two itself
ANSWERS = tuple(metric.name for metric in AnswerMetric)  # of an evaluation, too
VALIDATION = "val_"  # begins the name of an evaluation's metric; the section says it in its place
LAYERS = "_layers"  # ends the name of a list with a number of each layer


@dataclass(frozen=True, slots=True)
class Matrix:
    """A value of each expert of each layer, [L][E]; None where it was not finite."""

    rows: list[list[float | None]]

    def values(self) -> list[float]:
        return [value for row in self.rows for value in row if value is not None]


def panels(metrics: dict[str, Any], *, layers: Sequence[int], detailed: bool) -> dict[str, float | Matrix]:
    """A step's metrics by their names in W&B, without nulls; layers and experts only if `detailed`. `layers` are the
    numbers of the model's sparse layers."""
    shown: dict[str, Any] = {}
    for name, value in metrics.items():
        if name in UNSHOWN:
            continue
        if isinstance(value, dict):
            shown |= {f"{_section(name)}/{key}": one for key, one in value.items()}
        elif not isinstance(value, list):
            shown[_section(name)] = value
        elif detailed:
            shown |= _details(name, value, layers)
    return {name: value for name, value in shown.items() if isinstance(value, int | float | Matrix)}


def _section(name: str) -> str:
    if name.startswith(VALIDATION):
        return f"val/{name.removeprefix(VALIDATION)}"
    if name in ANSWERS:
        return f"val/{name}"
    section = "train" if name in TRAIN else "speed" if name in SPEED else "balance"
    return f"{section}/{name}"


def _details(name: str, values: list[Any], layers: Sequence[int]) -> dict[str, Any]:
    if values and all(isinstance(one, list) for one in values):
        matrix = Matrix(values)
        return {f"experts/{name}": matrix} if matrix.values() else {}
    base = f"layers/{name.removesuffix(LAYERS)}"
    return {f"{base}_{layer:02d}": value for layer, value in zip(layers, values, strict=False)}
