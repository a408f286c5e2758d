"""What a sweep writes beside its trials: trials.csv for people and programs, trials.json for the report."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from moe.config import Sampler
from moe.durable import write_durably
from moe.report.sweep_reader import JSON, POINT
from moe.sweep.definition import Definition
from moe.sweep.metrics import TOLD
from moe.sweep.study import TRIALS, Study

CSV = "trials.csv"
AFTER = ("state", "steps", "tokens", "seconds", "error", "run_dir")


def write_results(folder: Path, definition: Definition, study: Study) -> None:
    """Replaces both files; a row per finished trial, in the order of their numbers. Raises OSError."""
    rows = [_row(trial, definition) for trial in study.finished()]
    params = [f"params.{name}" for name in definition.names()]
    metrics = list(dict.fromkeys((*TOLD, *definition.settings.objectives)))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["trial", *params, "seed", *metrics, *AFTER], extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        named = {f"params.{key}": value for key, value in row["params"].items()}
        writer.writerow({**row, **named, **row["metrics"], "error": row["error"]})
    write_durably(folder / CSV, text.getvalue())
    write_durably(
        folder / JSON, json.dumps(_described(definition) | {"trials": rows, "importance": study.importance()})
    )


def _described(definition: Definition) -> dict[str, Any]:
    settings = definition.settings
    given = settings.sampler is Sampler.points
    return {
        "objectives": settings.objectives,
        "maximize": settings.maximize,
        "seeds": settings.seeds,
        "sampler": settings.sampler.name,
        "steps": definition.base.train.steps,
        "trials_asked": settings.trials,
        "names": [POINT] if given else definition.names(),
        "log": [one.key for one in definition.dimensions if one.log],
    }


def _row(trial: FrozenTrial, definition: Definition) -> dict[str, Any]:
    attrs = trial.user_attrs
    return {
        "trial": trial.number,
        "params": definition.params(trial.params),
        "seed": attrs["seed"],
        "metrics": {name: _finite(value) for name, value in attrs.get("metrics", {}).items()},
        "state": attrs["state"],
        "steps": attrs.get("steps", 0),
        "tokens": attrs["tokens"],
        "seconds": round(attrs.get("seconds", 0), 1),
        "error": attrs.get("error", ""),
        "run_dir": f"{TRIALS}/{trial.number:04d}",
        "command": definition.overrides(trial.params, attrs["seed"]),
    }


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None
