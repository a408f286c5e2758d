"""SIGTERM, SIGUSR1 and Ctrl-C stop a run after the current step, on all ranks, and save a checkpoint.

The handler only counts the signal. The counts of all ranks are part of the all-reduce that sums each step's metrics, so
all ranks learn after the same step that one of them was signalled, and by which signal; no rank is left waiting for one
that has stopped. A further signal during the save changes nothing, except a second Ctrl-C, which ends the process at
once. Where another rank is lost instead, no step will end: a SIGTERM then ends this rank, as torchrun wants.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from moe.errors import Stopped, UserError, lost_rank

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Handles SIGNALS within its `with` block; `prints`: this rank reports a received signal on stderr.

    A signal that was ignored before (SIGINT under nohup or a script's `&`) stays ignored.
    """

    def __init__(self, *, prints: bool) -> None:
        self._prints = prints
        self._received: dict[signal.Signals, int] = dict.fromkeys(SIGNALS, 0)
        self._previous: dict[signal.Signals, Any] = {}  # the handlers to restore
        self.agreed: signal.Signals | None = None  # the signal that all ranks stop for, once they know it

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._received[signal.SIGTERM] and isinstance(error, RuntimeError) and lost_rank(error):
            signal.raise_signal(signal.SIGTERM)  # only counted so far, and torchrun sends no second one

    def flags(self) -> list[int]:
        """How often this rank received each of SIGNALS."""
        return list(self._received.values())

    def agree(self, flags: Sequence[float]) -> None:
        """Sets `agreed`; `flags` are summed over all ranks."""
        self.agreed = next((number for number, count in zip(SIGNALS, flags, strict=True) if count), None)

    def stopped(self, run_dir: Path, step: int, *, saved: bool) -> Stopped | UserError:
        """The exception that ends the program, once all ranks are ready to stop."""
        assert self.agreed is not None
        text = f"{self.agreed.name}: stopped after step {step}"
        if not saved:
            return UserError(
                f"{run_dir}: {text}, but the checkpoint could not be saved (see above): once there is room, the same "
                "command goes on from the newest checkpoint"
            )
        return Stopped(f"{text}, which is saved in {run_dir}; the same command resumes from there", self.agreed)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        number = signal.Signals(signum)
        if number is signal.SIGINT and self._received[number]:
            raise KeyboardInterrupt
        again = any(self._received.values())
        self._received[number] += 1
        if not self._prints:
            return
        if again:
            text = f"{number.name}: the run is already stopping and ends when its checkpoint is saved"
        else:
            text = f"{number.name}: the run stops after this step and saves a checkpoint"
        if number is signal.SIGINT:
            text += " (another Ctrl-C ends it at once, without a checkpoint)"
        # NOTE: os.write, not print: the signal may have interrupted a print, which holds the stream's lock.
        os.write(2, f"\nmoe: {text}\n".encode())
