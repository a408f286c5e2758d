"""SIGTERM, SIGUSR1 and Ctrl-C stop a run in good order: after the step under way, on all ranks, with a checkpoint.

A signal only raises a flag. The flags of all ranks travel with the sum that every step makes of its metrics, so all
ranks know after the same step that one of them was asked to stop, and by which signal; no rank waits for another that
has left. A signal that comes again during the save changes nothing, except a second Ctrl-C, which gives up at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from moe.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Hears SIGNALS between `with` and its end; `speaks`: this rank says on stderr what it heard.

    A signal that was ignored before (SIGINT under nohup or a script's `&`) stays ignored.
    """

    def __init__(self, *, speaks: bool) -> None:
        self._speaks = speaks
        self._heard: dict[signal.Signals, int] = dict.fromkeys(SIGNALS, 0)
        self._before: dict[signal.Signals, Any] = {}
        self.agreed: signal.Signals | None = None  # what all ranks stop for, once they know

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def flags(self) -> list[int]:
        """One for each of SIGNALS: how often this rank heard it."""
        return list(self._heard.values())

    def agree(self, flags: Sequence[float]) -> None:
        """`flags` summed over all ranks."""
        self.agreed = next((number for number, count in zip(SIGNALS, flags, strict=True) if count), None)

    def stopped(self, run_dir: Path, step: int, *, saved: bool) -> Stopped | ValueError:
        """What ends the program, once all ranks are ready to leave."""
        assert self.agreed is not None
        text = f"{self.agreed.name}: stopped after step {step}"
        if not saved:
            return ValueError(f"{run_dir}: {text}, but the checkpoint could not be saved (see above)")
        return Stopped(f"{text}, which is saved in {run_dir}; the same command goes on from there", self.agreed)

    def _hear(self, signum: int, _: FrameType | None) -> None:
        number = signal.Signals(signum)
        if number is signal.SIGINT and self._heard[number]:
            raise KeyboardInterrupt
        again = any(self._heard.values())
        self._heard[number] += 1
        if not self._speaks:
            return
        if again:
            text = f"{number.name}: the run is stopping already, once its checkpoint is saved"
        else:
            text = f"{number.name}: the run stops after this step, with a checkpoint"
        if number is signal.SIGINT:
            text += " (Ctrl-C once more gives up at once)"
        # NOTE: not print: the signal may have come in the middle of one, whose lock is held.
        os.write(2, f"\nmoe: {text}\n".encode())
