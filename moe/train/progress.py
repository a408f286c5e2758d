"""What rank 0 shows: a live bar on a terminal, plain lines elsewhere (files, CI, torchrun's pipes)."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def _short(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Display:
    """Silent on every rank but the first."""

    def __init__(self, *, is_main: bool, steps: int, log_every: int) -> None:
        self._console = Console(quiet=not is_main, highlight=False, soft_wrap=True)
        self._live = self._console.is_terminal and is_main
        self._steps, self._log_every = steps, log_every
        self._bar: Progress | None = None
        self._started, self._first_step = time.perf_counter(), 0

    def line(self, text: str) -> None:
        self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self._console.print(f"warning: {text}", markup=False, style="yellow" if self._live else None)

    def start(self, first_step: int) -> None:
        """Training begins after `first_step` finished steps."""
        self._started, self._first_step = time.perf_counter(), first_step
        if self._live:
            bar = Progress(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            bar.add_task("train", total=self._steps, completed=first_step, figures="")
            bar.start()
            self._bar = bar

    def step(self, figures: dict[str, Any]) -> None:
        step = figures["step"]
        text = f"loss {figures['lm_loss']:.3f} · {figures['tokens_per_second']:,.0f} tokens/s"
        if figures["max_violation"] is not None:
            text += f" · balance {figures['load_balancing_loss']:.3f} · MaxVio {figures['max_violation']:.2f}"
        if figures["dropped_fraction"]:
            text += f" · dropped {figures['dropped_fraction']:.1%}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, figures=text)
        elif step % self._log_every == 0 or step in (self._first_step + 1, self._steps):
            done = step - self._first_step
            remaining = (time.perf_counter() - self._started) / done * (self._steps - step)
            self.line(f"step {step}/{self._steps} · {text} · {_short(remaining)} left")
        if "val_loss" in figures:
            gap = figures["val_unigram_entropy"] - figures["val_loss"]
            self.line(
                f"step {step}/{self._steps} · validation loss {figures['val_loss']:.4f} nats"
                f" ({gap:+.2f} under the unigram entropy) · {figures['val_bits_per_byte']:.3f} bits per byte"
            )

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
