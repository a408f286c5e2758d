"""Keys of several benchmarks; all other overrides are those of `moe train`. And how rounds and growth are stated."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moe.errors import UserError

DISAGREE = 1.5  # largest ÷ smallest figure of a run's rounds


@dataclass(kw_only=True, slots=True)
class Rounds:
    """`rounds` pairs of measurements of `steps` optimizer steps each."""

    rounds: int = 7
    steps: int = 3

    def __post_init__(self) -> None:
        for name in ("rounds", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be ≥ 1")


def split(
    overrides: list[str], default: Rounds | None = None, names: tuple[str, ...] = ("rounds", "steps")
) -> tuple[Rounds, list[str]]:
    """Splits `rounds=` and `steps=`, or those of them in `names`, from the other overrides. Raises UserError."""
    own: dict[str, int] = {}
    rest: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in names:
            rest.append(override)
            continue
        try:
            own[key] = int(value)
        except ValueError:
            raise UserError(f"{override} must be a whole number") from None
    return replace(default or Rounds(), **own), rest


def counted(number: int, noun: str) -> str:
    """`1 round`, `3 rounds`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def load() -> str:
    """`load 0.4`: processes of the machine that ran or waited for a core, over the last minute, this one included."""
    return f"load {os.getloadavg()[0]:.1f}"


def spread(ratios: Sequence[float]) -> str:
    """`1.10 to 1.30`, with a warning where the rounds disagree; `1.10` of one round."""
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    warning = "; the rounds disagree: the machine is busy" if max(ratios) > DISAGREE * min(ratios) else ""
    return f"{min(ratios):.2f} to {max(ratios):.2f}{warning}"


def least_steady(rounds: Mapping[str, Sequence[float]]) -> str:
    """`rounds of NAME ÷ their median: 0.98 to 1.10`, for the name whose rounds differ most; with `spread`'s warning."""
    name, figures = max(rounds.items(), key=lambda one: max(one[1]) / min(one[1]))
    middle = statistics.median(figures)
    return f"rounds of {name} ÷ their median: {spread([one / middle for one in figures])}"


def exponent(values: dict[int, float]) -> float:
    """b of the power law values ∝ size^b, by least squares of the logarithms."""
    sizes, logs = [math.log(size) for size in values], [math.log(value) for value in values.values()]
    return statistics.linear_regression(sizes, logs).slope
