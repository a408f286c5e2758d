"""What a sweep shows: a line when a trial begins and ends, and how long the rest will take."""

from __future__ import annotations

import time
from pathlib import Path

from optuna.trial import TrialState

from moe.config.space import Value
from moe.sweep.definition import Definition
from moe.sweep.study import Study
from moe.sweep.worker import Worker
from moe.train.progress import duration

EVERY_SECONDS = 60


class SweepDisplay:
    """Plain lines on stdout."""

    def __init__(self, folder: Path, definition: Definition) -> None:
        self._folder, self._definition = folder, definition
        self._seconds: list[float] = []  # of the trials that this command has trained from their beginning
        self._began = self._told = time.monotonic()

    def line(self, text: str) -> None:
        print(text, flush=True)

    def started(self, worker: Worker) -> None:
        claimed = worker.claimed
        again = f", goes on after step {worker.first_step}" if worker.first_step else ""
        self.line(f"trial {claimed.number}: {_named(claimed.params)} · seed {claimed.seed}{again}")

    def finished(self, worker: Worker, study: Study) -> None:
        claimed = worker.claimed
        if not worker.first_step and not worker.pruned:
            self._seconds.append(time.monotonic() - worker.began)
        trial = next(trial for trial in study.finished() if trial.number == claimed.number)
        attrs = trial.user_attrs
        parts = [f"{name} {_short(value)}" for name, value in attrs["metrics"].items()]
        if attrs["error"]:
            parts.append(attrs["error"])
        self.line(f"trial {claimed.number}: {attrs['state']} · {' · '.join(parts)} · {self._progress(study, [])}")

    def interrupted(self, worker: Worker) -> None:
        self.line(f"trial {worker.claimed.number}: interrupted after step {worker.metrics.last_step}")

    def tick(self, study: Study, workers: list[Worker]) -> None:
        """A line a minute."""
        if time.monotonic() - self._told < EVERY_SECONDS:
            return
        self._told = time.monotonic()
        running = [
            f"trial {one.claimed.number} at step {one.metrics.last_step}/{one.claimed.config.train.steps}"
            for one in workers
        ]
        self.line(f"{' · '.join(running)} · {self._progress(study, workers)}")

    def ended(self, study: Study, stopped: bool) -> None:
        trials = study.finished()
        complete = sum(trial.user_attrs["state"] == TrialState.COMPLETE.name for trial in trials)
        if study.exhausted:
            self.line("the sampler finds no point that isn't trained already")
        if stopped:
            self.line("sweep.hours is over; the same command goes on")
        self.line(f"{complete} of {len(trials)} trials complete · {self._folder / 'trials.csv'}")

    def _progress(self, study: Study, workers: list[Worker]) -> str:
        finished, settings = study.finished(), self._definition.settings
        total = self._total()
        of = "" if total is None else f" of {total:g}"
        text = f"{len(finished)}{of} trials done"
        left: list[float] = []
        one = self._seconds_a_trial(workers)
        if total is not None and one is not None:
            begun = sum(worker.metrics.last_step / worker.claimed.config.train.steps for worker in workers)
            left.append(max(0.0, total - len(finished) - begun) * one / settings.workers)
        if settings.hours is not None:
            left.append(3600 * settings.hours - (time.monotonic() - self._began))
        return f"{text} · about {duration(max(0, min(left)))} left" if left else text

    def _total(self) -> float | None:
        """Trials until the budget is spent; None where only time ends the sweep."""
        settings, points = self._definition.settings, self._definition.listed()
        bounds = [settings.trials, None if points is None else len(points) * settings.seeds]
        if settings.tokens is not None:
            bounds.append(-(-settings.tokens // self._definition.tokens()))
        return min((bound for bound in bounds if bound is not None), default=None)

    def _seconds_a_trial(self, workers: list[Worker]) -> float | None:
        if self._seconds:
            return sum(self._seconds) / len(self._seconds)
        for worker in workers:
            row = worker.metrics.rows.get(worker.metrics.last_step)
            if row is not None and "elapsed" in row:
                return row["elapsed"] / row["step"] * worker.claimed.config.train.steps
        return None


def _named(params: dict[str, Value]) -> str:
    return " ".join(f"{key}={_short(value)}" for key, value in params.items())


def _short(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "null" if value is None else str(value)
