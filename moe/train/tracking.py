"""Where metrics go: always RUN_DIR/metrics.jsonl, and W&B (`moe.train.wandb_run`)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe.config import Config, TrackingBackend
from moe.durable import append_line, write_durably
from moe.train.wandb_run import WandbRun
from moe.untrusted import Values, json_lines


def finite(value: Any) -> Any:
    """Metrics with None for NaN and infinities, for which JSON has no value."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value


def cut_back(path: Path, step: int) -> None:
    """Keep the lines of metrics.jsonl (or samples.jsonl) up to `step`: a resume writes the later ones again.

    Also drops lines that a crash has torn, wherever they are. Raises UserError for a line whose step is no number.
    """
    if not path.exists():
        return
    kept = []
    for line in json_lines(path):
        if line.value is not None:
            values = Values(line.value, f"{path}:{line.number}", "remove the line")
            if values.count("step") <= step:
                kept.append(line.raw.rstrip(b"\n") + b"\n")
    write_durably(path, b"".join(kept))


class Tracker:
    """Rank 0's writer. `facts` about the run (JSON values) go to W&B beside the configuration."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        *,
        resumed: bool,
        warn: Callable[[str], None],
        facts: dict[str, Any] | None = None,
    ) -> None:
        self._folder, self._warn = run_dir, warn
        self._unwritten = ""  # lines that metrics.jsonl had no room for
        self._wandb: WandbRun | None = None
        if config.tracking.backend is TrackingBackend.wandb:
            self._wandb = WandbRun(config, run_dir, facts or {}, resumed=resumed, warn=warn)

    def log(self, metrics: dict[str, Any]) -> None:
        """One JSON line, null for what is not finite; the same to W&B.

        A line that can't be written is a warning, and is written with the next one.
        """
        metrics = finite(metrics)
        self._unwritten += json.dumps(metrics, allow_nan=False) + "\n"
        try:
            self._write()
        except OSError as error:  # a full disk costs metrics, not the run
            self._warn(
                f"{error.filename}: the metrics of step {metrics['step']} could not be written ({error.strerror}); "
                "the next step tries again"
            )
        if self._wandb is not None:
            self._wandb.log(metrics)

    def sample(self, sample: dict[str, Any]) -> None:
        """{"step", "prompt", "text"} to W&B."""
        if self._wandb is not None:
            self._wandb.sample(sample)

    def alert(self, texts: list[str]) -> None:
        """The step's new collapse alarms, which metrics.jsonl has already, to W&B."""
        if self._wandb is not None:
            for text in texts:
                self._wandb.alert(text)

    def routing(self, routing: dict[str, Any]) -> None:
        """routing.json to W&B."""
        if self._wandb is not None:
            self._wandb.routing(routing)

    def report(self, path: Path) -> None:
        """The written report.html to W&B, if `tracking.report`."""
        if self._wandb is not None:
            self._wandb.report(path)

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.close()

    def _write(self) -> None:
        append_line(self._folder / "metrics.jsonl", self._unwritten)
        self._unwritten = ""
