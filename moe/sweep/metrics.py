"""What a trial reached: its metrics, from the metrics.jsonl that its training writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from moe.config.suggest import closest
from moe.errors import UserError

VALIDATION = "val_"  # a metric of evaluations, not of every step
LOSSES = ("loss", "lm_loss", "val_loss")  # which every run has
TOLD = ("val_loss", "max_violation")  # columns of trials.csv, whatever the objectives are


class Metrics:
    """The lines of a metrics.jsonl that grows, and that a resume cuts back, by step."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self.rows: dict[int, dict[str, Any]] = {}

    def read(self) -> bool:
        """Takes up whole lines written since the last call; True if there were any."""
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            return False
        if size < self._offset:  # cut back
            self._offset, self.rows = 0, {}
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # torn by a kill; training trains that step again
                continue
            self.rows[row["step"]] = row
        return bool(whole)

    @property
    def last_step(self) -> int:
        return max(self.rows, default=0)

    def value(self, name: str, average_steps: int) -> float | None:
        """Of a val_ metric the last value, of another the mean over the last `average_steps` steps; NaN if one of these
        is not finite, None where the run has none (MaxVio of a dense model).

        metrics.jsonl has null for both: a metric that was a number before, and a loss at any time, is not finite.
        """
        steps = sorted(self.rows)
        if name.startswith(VALIDATION):
            steps = [step for step in steps if name in self.rows[step]][-1:]
        given = [self.rows[step][name] for step in steps[-average_steps:] if name in self.rows[step]]
        if None in given:
            numbers = name in LOSSES or any(row.get(name) is not None for row in self.rows.values())
            return math.nan if numbers else None
        return math.fsum(given) / len(given) if given else None

    def evaluations(self, name: str) -> dict[int, float]:
        """{step: value} at the steps that evaluated."""
        return {
            step: row[name]
            for step, row in sorted(self.rows.items())
            if "val_loss" in row and row.get(name) is not None and math.isfinite(row[name])
        }

    def check(self, names: list[str]) -> None:
        """Raises UserError when the run writes no metric of one of these names."""
        for name in names:
            of_evaluation = name.startswith(VALIDATION)
            rows = [row for row in self.rows.values() if not of_evaluation or "val_loss" in row]
            if not rows or any(name in row and not isinstance(row[name], list | dict) for row in rows):
                continue
            known = sorted(
                {
                    key
                    for row in self.rows.values()
                    for key, value in row.items()
                    if not isinstance(value, list | dict) and key not in ("time", "step")
                }
            )
            near = closest(name, known)
            meant = f"did you mean {near}? " if near else ""
            raise UserError(f"sweep.objectives: {name}: no such metric; {meant}There are {', '.join(known)}")


def newest_checkpoint(run_dir: Path) -> int:
    """Its step; 0 where there is none."""
    names = (path.name for path in (run_dir / "checkpoints").glob("step_*"))
    return max((int(name[5:]) for name in names if name[5:].isdecimal()), default=0)
