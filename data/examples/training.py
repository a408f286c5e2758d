"""What a run directory says about its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe.config.compose import read_config
from moe.plan.counts import count_parameters


def runs(folder: Path, pattern: str = "*") -> list[Path]:
    """The run directories below FOLDER/runs whose names fit, in the order of their names."""
    return sorted(path.parent for path in (folder / "runs").glob(f"{pattern}/config.yaml"))


def final_metrics(run: Path) -> dict[str, Any]:
    """The last line of metrics.jsonl, and of each metric that it lacks the newest value before."""
    found: dict[str, Any] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        found |= {name: value for name, value in json.loads(line).items() if value is not None}
    return found


def active_parameters(run: Path) -> int:
    """Those that one token uses."""
    return count_parameters(read_config(run / "config.yaml"))[1]
