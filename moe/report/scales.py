"""Numbers for axes: round ticks and their labels; and downsampling of long series that keeps spikes visible."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

POINTS = 480  # per series: about one for every two pixels of the widest chart


@dataclass(slots=True)
class Points:
    """A series ready to draw. `values` are means over a point's steps, `low` and `high` their minimum and maximum."""

    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    stride: int  # steps per point

    @property
    def empty(self) -> bool:
        return not np.isfinite(self.values).any()


def downsample(steps: np.ndarray, values: np.ndarray, *, sparse: bool = False, limit: int = POINTS) -> Points:
    """At most `limit` points, each with the mean, minimum and maximum of consecutive steps.

    `sparse`: not every step has a value (as with evaluations); steps without one are left out instead of leaving gaps.
    """
    if sparse:
        keep = np.isfinite(values)
        steps, values = steps[keep], values[keep]
    if len(steps) <= limit:
        return Points(steps, values, values, values, 1)
    edges = np.linspace(0, len(steps), limit + 1).round().astype(int)
    mean, low, high = (np.full(limit, math.nan) for _ in range(3))
    for index, (start, end) in enumerate(itertools.pairwise(edges)):
        chunk = values[start:end]
        chunk = chunk[np.isfinite(chunk)]
        if len(chunk):
            mean[index], low[index], high[index] = chunk.mean(), chunk.min(), chunk.max()
    middles = steps[(edges[:-1] + edges[1:] - 1) // 2].copy()
    middles[0], middles[-1] = steps[0], steps[-1]  # the curve spans the whole run
    return Points(middles, mean, low, high, math.ceil(len(steps) / limit))


def nice_step(span: float, count: int) -> float:
    """The step of {1, 2, 2.5, 5} × 10^n that divides `span` into about `count` parts."""
    raw = span / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    return power * min((1, 2, 2.5, 5, 10), key=lambda factor: abs(math.log(factor * power / raw)))


def linear_ticks(low: float, high: float, count: int = 5, *, integer: bool = False) -> list[float]:
    """Round numbers within [low, high]."""
    if high <= low:
        return [low]
    step = nice_step(high - low, count)
    if integer:
        step = max(1.0, round(step))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) + 0.0 for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], with 2 and 5 between them where there is room."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= 6:
            break
    return ticks[:: math.ceil(len(ticks) / 6)]


def tick_label(value: float, ticks: list[float]) -> str:
    """The shortest text that differs from the neighbouring ticks': 0.25, 12k, 1.5M, 5e-4."""
    top = max(abs(tick) for tick in ticks)
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    step = min(gaps) if gaps else abs(value) or 1.0
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if top >= 10 * size or (top >= size and size > 1e3):
            return "0" if value == 0 else f"{value / size:.{_decimals(step / size)}f}{suffix}"
    if 0 < top < 2e-3:
        return "0" if value == 0 else scientific(value)
    return f"{value:,.{_decimals(step)}f}"


def _decimals(step: float) -> int:
    """How many decimals (up to 6) multiples of `step` need."""
    return next((digits for digits in range(6) if abs(step * 10**digits - round(step * 10**digits)) < 1e-6), 6)


def scientific(value: float, digits: int = 2) -> str:
    """5e-4, 2.5e-4: without the trailing and leading zeros of Python's own format."""
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def short(value: float) -> str:
    """A number with four significant digits and thousands separators; – if it isn't finite."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1000 or value == round(value):
        return f"{value:,.0f}"
    if size < 1e-3:
        return scientific(value)
    return f"{value:.{max(0, 3 - math.floor(math.log10(size)))}f}"


def count(value: float) -> str:
    """A large count, shortened: 812, 46.7 B, 1.89 M."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            unit = 1e3 if suffix == "k" else size
            return f"{value / unit:.3g} {suffix}" if value / unit < 999.5 else f"{value / unit:,.0f} {suffix}"
    return short(value)
