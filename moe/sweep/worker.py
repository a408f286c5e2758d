"""One trial's training: `moe train` as a process of its own, with its share of the machine."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

from moe.cores import usable_cores
from moe.sweep.command import train_command, train_environment
from moe.sweep.metrics import Metrics
from moe.sweep.study import Claimed
from moe.untrusted import open_regular

OUTPUT = "output.txt"
STOP_SECONDS = 120  # that a trial gets to save after SIGTERM
# Exit codes after which the same command goes on from a checkpoint: hung, and ended by a signal.
INTERRUPTED = (75, 129, 130, 138, 143, -signal.SIGHUP, -signal.SIGINT, -signal.SIGKILL, -signal.SIGTERM)


class Worker:
    """Trains a claimed trial in place `slot` of `slots`."""

    def __init__(self, claimed: Claimed, slot: int, slots: int, group: str) -> None:
        self.claimed, self.slot = claimed, slot
        self.metrics = Metrics(claimed.run_dir / "metrics.jsonl")
        self.metrics.read()  # of an interrupted trial
        self.first_step = self.metrics.last_step
        self.began = time.monotonic()
        self.pruned = False
        self._asked: float | None = None  # when it was asked to stop
        self._output = claimed.run_dir / OUTPUT
        with open_regular(self._output, "ab") as out:
            self._from = out.tell()
            self._process = subprocess.Popen(
                train_command([*claimed.overrides, f"run_dir={claimed.run_dir}"]),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=_environment(slot, slots, group),
            )

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        if self._asked is not None and time.monotonic() - self._asked > STOP_SECONDS:
            self._process.kill()
        return self._process.poll()

    def stop(self) -> None:
        """Asks it to save and end."""
        if self._asked is None:
            self._asked = time.monotonic()
            self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def last_line(self) -> str:
        """What it said at its end."""
        with self._output.open("rb") as file:
            file.seek(max(self._from, self._output.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def _environment(slot: int, slots: int, group: str) -> dict[str, str]:
    inherited = train_environment()
    inherited["WANDB_RUN_GROUP"] = inherited.get("WANDB_RUN_GROUP", group)
    inherited.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // slots)))
    if devices := _devices(inherited.get("CUDA_VISIBLE_DEVICES")):
        inherited["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return inherited


def _devices(stated: str | None) -> list[str]:
    """The GPUs to divide, as CUDA_VISIBLE_DEVICES names them."""
    if stated is not None:
        return [name for name in stated.split(",") if name.strip()]
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
