"""Reads a sweep's folder: trials.json, and the balance curves of the trials' run directories."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.errors import UserError
from moe.report.scales import short
from moe.untrusted import is_count, is_real, json_lines, read_json

JSON = "trials.json"
LARGEST = 1 << 30  # bytes of it: a trial takes some 2 kB
POINT = "point"  # the searched name of a sweep of named points
COMPLETE = "COMPLETE"


@dataclass(slots=True)
class TrialRow:
    """A finished trial. `metrics` has None where the run has no such metric (MaxVio of a dense model)."""

    number: int
    params: dict[str, Any]
    seed: int
    metrics: dict[str, float | None]
    state: str
    error: str
    seconds: float
    run_dir: str
    command: list[str]

    def value(self, name: str) -> float:
        """NaN where there is none."""
        value = self.metrics.get(name)
        return math.nan if value is None else value


@dataclass(slots=True)
class SweepHistory:
    """`names` are the searched keys, `log` those on a log scale; `importance` is Optuna's, by objective."""

    folder: Path
    trials: list[TrialRow]
    objectives: list[str]
    maximize: list[str]
    names: list[str]
    log: list[str]
    sampler: str
    seeds: int
    steps: int
    asked: int | None
    importance: dict[str, dict[str, float]]

    def complete(self) -> list[TrialRow]:
        """Complete trials, the best first by the first objective."""
        name = self.objectives[0]
        sign = -1 if name in self.maximize else 1
        found = [row for row in self.trials if row.state == COMPLETE and math.isfinite(row.value(name))]
        return sorted(found, key=lambda row: sign * row.value(name))


def read_sweep(folder: Path) -> SweepHistory:
    """Raises UserError, one line naming the file and the fix."""
    path = folder / JSON
    try:
        data = read_json(path, LARGEST)
        trials = [
            TrialRow(
                number=row["trial"],
                params=dict(row["params"]),
                seed=row["seed"],
                metrics={name: value if is_real(value) else None for name, value in row["metrics"].items()},
                state=row["state"],
                error=row["error"],
                seconds=row["seconds"],
                run_dir=row["run_dir"],
                command=list(row["command"]),
            )
            for row in data["trials"]
        ]
        return SweepHistory(
            folder=folder,
            trials=trials,
            objectives=list(data["objectives"]),
            maximize=list(data["maximize"]),
            names=list(data["names"]),
            log=list(data["log"]),
            sampler=data["sampler"],
            seeds=data["seeds"],
            steps=data["steps"],
            asked=data["trials_asked"],
            importance=dict(data["importance"]),
        )
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; `moe sweep run_dir={folder}` writes it") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not what `moe sweep` writes ({error!r}); the same `moe sweep` writes it anew"
        ) from error


def point_label(row: TrialRow, names: list[str]) -> str:
    """The searched values of a trial, short enough for a legend."""
    if names == [POINT]:
        return str(row.params[POINT])
    return ", ".join(f"{name.rpartition('.')[2]} {value_label(row.params[name])}" for name in names)


def value_label(value: Any) -> str:
    return short(value) if isinstance(value, float) else "null" if value is None else str(value)


def balance_curve(folder: Path, row: TrialRow) -> tuple[list[int], list[float]]:
    """(steps, MaxVio) of a trial's metrics.jsonl; empty where it has none."""
    found = {step: metrics["max_violation"] for step, metrics in trial_metrics(folder, row).items()}
    steps = [step for step, value in found.items() if is_real(value)]
    return steps, [found[step] for step in steps]


def trial_metrics(folder: Path, row: TrialRow) -> dict[int, dict[str, Any]]:
    """The metrics of a trial by step, in order; {} where its run directory was removed to save room. What a kill has
    torn is left out. Raises UserError where metrics.jsonl is no regular file or not a run's."""
    path = folder / row.run_dir / "metrics.jsonl"
    found: dict[int, dict[str, Any]] = {}
    try:
        for line in json_lines(path):
            if line.value is not None and is_count(line.value.get("step")) and "max_violation" in line.value:
                found[line.value["step"]] = line.value
    except OSError:
        return {}
    return dict(sorted(found.items()))
