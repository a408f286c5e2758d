"""A sweep's table as Markdown, for a page with text around it: differences to one point, paired by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.durable import write_section
from moe.errors import UserError
from moe.report.sweep_reader import POINT, SweepHistory, TrialRow, point_label, read_sweep, trial_metrics
from moe.report.sweep_statistics import Difference, Point, differences, interval, points

BEGIN, END = "<!-- sweep: begin -->", "<!-- sweep: end -->"
WINDOW = 50  # steps whose choices are summed before MaxVio is taken
LEAKY = "val_loss_leaky"  # of a router that reads ahead


@dataclass(frozen=True, slots=True)
class Size:
    """Of a point's model: parameters, those that a token uses, tokens trained on."""

    parameters: int
    active: int
    tokens: int


def write_sweep_markdown(folder: Path, page: Path, reference: str, size_of: Callable[[TrialRow], Size]) -> None:
    """Replaces what stands between the markers of `page`; a page that doesn't exist is made of the table alone.

    Raises UserError for a sweep that can't be read, a `reference` that is none of its points, a folder that doesn't
    exist, or a page without markers.
    """
    if not page.absolute().parent.is_dir():
        raise UserError(f"markdown={page} must be a file in a folder that exists")
    lines = list(render(read_sweep(folder), reference, size_of))
    if not page.exists():
        page.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    write_section(page, BEGIN, END, lines)


def render(sweep: SweepHistory, reference: str, size_of: Callable[[TrialRow], Size]) -> Iterator[str]:
    """Lines of Markdown. Raises UserError."""
    found = points(sweep)
    by_name = {point_label(point.best, sweep.names): point for point in found}
    if reference not in by_name:
        raise UserError(f"reference={reference} is no point with a complete trial; there are {', '.join(by_name)}")
    name, base = sweep.objectives[0], by_name[reference]
    told = {id(one.point): one for one in differences(base, found, name)}
    curves = {id(point): [Curves.of(sweep, row) for row in point.trials] for point in found}
    others = [other for other in sweep.objectives if other != name]
    heads = ["point", "parameters (active)", "seeds", f"{name}", f"minus {reference}", *others]
    heads += [f"MaxVio over {WINDOW} steps", "minutes a trial"]
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for point in found:
        size = size_of(point.best)
        cells = [
            point_label(point.best, sweep.names),
            f"{size.parameters / 1e6:.2f} M ({size.active / 1e6:.2f} M)",
            str(len(point.trials)),
            _loss(point, name, curves[id(point)]),
            difference_text(told.get(id(point))),
            *(mean_text(point.values(other), 3) for other in others),
            mean_text([one.over_window for one in curves[id(point)]], 3),
            f"{math.fsum(row.seconds for row in point.trials) / len(point.trials) / 60:.1f}",
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield from _keys(sweep, found)
    yield from _caveats(sweep, found, reference, size_of(base.best))


def _loss(point: Point, name: str, curves: list[Curves]) -> str:
    leaky = [one.leaky for one in curves if not math.isnan(one.leaky)]
    more = f" (reading ahead, as trained: {mean_text(leaky, 3)})" if leaky else ""
    return f"{mean_text(point.values(name), 4)}{more}"


def difference_text(told: Difference | None) -> str:
    """The mean ± half of its interval, bold where the interval excludes 0."""
    if told is None:
        return "–"
    if math.isnan(told.half):
        return f"{told.mean:+.4f}"
    number = f"{told.mean:+.4f} ± {told.half:.4f}"
    return number if told.within_noise else f"**{number}**"


def mean_text(values: list[float], digits: int) -> str:
    """The mean and the largest distance of a value from it."""
    mean, _ = interval([value for value in values if math.isfinite(value)])
    if math.isnan(mean):
        return "–"
    spread = max(abs(value - mean) for value in values if math.isfinite(value))
    return f"{mean:.{digits}f} ± {spread:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def _keys(sweep: SweepHistory, found: list[Point]) -> Iterator[str]:
    """What each named point sets."""
    if sweep.names[:1] != [POINT]:
        return
    for point in sorted(found, key=lambda one: one.best.number):
        params = {key: value for key, value in point.best.params.items() if key != POINT}
        keys = " ".join(f"{key}={value}" for key, value in params.items())
        yield f"- {point_label(point.best, sweep.names)}: {f'`{keys}`' if keys else 'the sweep’s overrides alone'}"
    yield ""


def _caveats(sweep: SweepHistory, found: list[Point], reference: str, size: Size) -> Iterator[str]:
    seconds = math.fsum(row.seconds for row in sweep.trials)
    failed = sum(row.state == "FAIL" for row in sweep.trials)
    yield (
        f"{len(sweep.trials)} trials ({failed} failed), {sweep.steps:,} steps of {size.tokens // sweep.steps:,} "
        f"tokens each, {seconds / 3600:.1f} hours of training in all. ± beside a mean is the largest distance of a "
        f"seed from it; ± in “minus {reference}” is half of Student's 95 % interval of the mean difference, paired by "
        "seed, since points with the same seed see the same data in the same order. Bold: the interval excludes 0. "
        f"With {len(found) - 1} differences and no correction, about {0.05 * (len(found) - 1):.1f} would be bold by "
        "chance alone."
    )


@dataclass(frozen=True, slots=True)
class Curves:
    """What a trial's metrics.jsonl tells beside its objectives; NaN where it doesn't."""

    over_window: float  # MaxVio of the choices summed over the last WINDOW steps, mean over layers
    leaky: float

    @classmethod
    def of(cls, sweep: SweepHistory, row: TrialRow) -> Curves:
        rows = list(trial_metrics(sweep.folder, row).values())
        shares = [shares for one in rows[-WINDOW:] if (shares := one.get("expert_shares"))]
        leaky = [one[LEAKY] for one in rows if isinstance(one.get(LEAKY), int | float)]
        return cls(_max_violation(shares), float(leaky[-1]) if leaky else math.nan)


def _max_violation(steps: list[list[list[Any]]]) -> float:
    """max_e E · (mean share of expert e) − 1, mean over layers, of `steps` [steps][layers][experts]."""
    if not steps:
        return math.nan
    found = []
    for layer in range(len(steps[0])):
        means = [math.fsum(column) / len(steps) for column in zip(*(shares[layer] for shares in steps), strict=True)]
        found.append(len(means) * max(means) / math.fsum(means) - 1)
    return math.fsum(found) / len(found)
