"""`moe train -m`: one training run after the other, each a process with a run directory of its own.

moe train -m router.aux_loss_coef=0.001,0.01 optim.lr=1e-3,2e-3 run_dir=runs/grid      runs/grid/0 … runs/grid/3
"""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from types import FrameType

from moe.config.multirun import expand, launch, split_hydra
from moe.errors import Stopped, UserError
from moe.sweep.command import train_command, train_environment
from moe.sweep.definition import Load

RUN_DIR, SWEEP_DIR = "run_dir=", "hydra.sweep.dir="


def run_jobs(overrides: list[str], load: Load) -> None:
    """All jobs are composed before the first is trained. Raises UserError naming those that failed, Stopped."""
    settings, rest = split_hydra(overrides)
    folder = _folder(settings, rest)
    jobs = expand([one for one in rest if not one.startswith(RUN_DIR)])
    jobs = [[*job, f"{RUN_DIR}{folder / str(number)}"] for number, job in enumerate(jobs)]
    for job in jobs:
        load(job)
    print(f"{len(jobs)} jobs in {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    settings = [one for one in settings if not one.startswith(SWEEP_DIR)]
    if settings:
        if code := launch([train_command(job) for job in jobs], settings, folder):
            raise UserError(f"a job failed (exit code {code} of Hydra's launcher; see above)")
        return
    failed = []
    for number, job in enumerate(jobs):
        print(f"#{number}: {' '.join(job)}", flush=True)
        if _Job(job).code != 0:
            failed.append(str(number))
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} jobs failed (see above): {', '.join(failed)}")


def _folder(settings: list[str], overrides: list[str]) -> Path:
    """Where the numbered run directories are: run_dir, hydra.sweep.dir, or Hydra's multirun/DAY/TIME."""
    stated = [one.removeprefix(RUN_DIR) for one in overrides if one.startswith(RUN_DIR)]
    stated += [one.removeprefix(SWEEP_DIR) for one in settings if one.startswith(SWEEP_DIR)]
    return Path(stated[0]) if stated else Path("multirun", time.strftime("%Y-%m-%d"), time.strftime("%H-%M-%S"))


class _Job:
    """Trains to the end; `code` is the exit code. A signal lets the job save, and ends the whole command."""

    def __init__(self, overrides: list[str]) -> None:
        self._signal: signal.Signals | None = None
        self._process: subprocess.Popen[bytes] | None = None
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._process = subprocess.Popen(train_command(overrides), env=train_environment())
            self.code = self._process.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self._signal is not None:
            raise Stopped(f"{self._signal.name}: stopped; the same command with its run_dir goes on", self._signal)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._signal = signal.Signals(number)
        if self._process is not None:
            self._process.terminate()
