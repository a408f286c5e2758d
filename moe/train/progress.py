"""What rank 0 shows: a live bar on a terminal, plain lines elsewhere (files, CI, torchrun's pipes)."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe.config import AnswerMetric


def duration(seconds: float) -> str:
    """For people: 40 s, 3 min 05 s, 2 h 10 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Display:
    """Prints on rank 0 only."""

    def __init__(self, *, is_main: bool, steps: int, log_every: int) -> None:
        self._console = Console(quiet=not is_main, highlight=False, soft_wrap=True)
        self._errors = Console(stderr=True, quiet=not is_main, highlight=False, soft_wrap=True)
        self._live = self._console.is_terminal and is_main
        self.steps, self._log_every = steps, log_every
        self._bar: Progress | None = None
        self._started, self._first_step = time.perf_counter(), 0

    def line(self, text: str) -> None:
        self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self._console.print(f"warning: {text}", markup=False, style="yellow" if self._live else None)

    def warn_on_stderr(self, text: str) -> None:
        """A warning about what the configuration asks for, for callers that read errors only."""
        self._errors.print(f"warning: {text}", markup=False)

    def start(self, first_step: int) -> None:
        """Training begins after `first_step` finished steps."""
        self._started, self._first_step = time.perf_counter(), first_step
        if self._live:
            bar = Progress(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[metrics]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            bar.add_task("train", total=self.steps, completed=first_step, metrics="")
            bar.start()
            self._bar = bar

    def step(self, metrics: dict[str, Any]) -> None:
        step = metrics["step"]
        text = f"lm_loss {metrics['lm_loss']:.3f} · {metrics['tokens_per_second']:,.0f} tokens/s"
        if metrics.get("load_balancing_loss") is not None:
            text += f" · balance {metrics['load_balancing_loss']:.3f}"
        if metrics["max_violation"] is not None:
            text += f" · MaxVio {metrics['max_violation']:.2f}"
        if metrics["dropped_fraction"]:
            text += f" · dropped {metrics['dropped_fraction']:.1%}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, metrics=text)
        elif step % self._log_every == 0 or step in (self._first_step + 1, self.steps):
            done = step - self._first_step
            remaining = (time.perf_counter() - self._started) / done * (self.steps - step)
            self.line(f"step {step}/{self.steps} · {text} · {duration(remaining)} left")
        if "val_loss" in metrics:
            gap = metrics["val_unigram_entropy"] - metrics["val_loss"]
            self.line(
                f"step {step}/{self.steps} · validation loss {metrics['val_loss']:.4f} nats"
                f" ({gap:+.2f} under the unigram entropy) · {metrics['val_bits_per_byte']:.3f} bits per byte"
                + "".join(f" · {one.name} {metrics[one.name]:.1%}" for one in AnswerMetric if one.name in metrics)
            )

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
