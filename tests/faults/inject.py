"""Runs `moe` with a fault injected: one function is patched, in this process, on the fault's rank only.

    FAULT='{"kind": "nan_loss", "rank": 1, "steps": [7]}' python -m tests.faults.inject train run_dir=…
    FAULT=… torchrun … -m tests.faults.inject train …

`FAULT` is JSON: `kind` names a function below, `rank` the rank that gets the fault (none: every rank); all other keys
are the function's keyword arguments. `steps` counts from 1, as metrics.jsonl does, also after a resume. Tests with
forked ranks call `inject` themselves.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.checkpoint.writer import Saver
from moe.engine.deepspeed.engine import DeepSpeedEngine
from moe.train.tracking import Tracker

Loss = Callable[[DeepSpeedEngine, Tensor], Tensor]


def _now(engine: DeepSpeedEngine) -> int:
    """The number of the current optimizer step, from 1."""
    return int(engine._engine.global_steps) + 1


def _before_backward(steps: Iterable[int] | None, change: Loss) -> None:
    """Replaces the loss given to backward by `change(engine, loss)` at these steps (None: every step)."""
    original, wanted = DeepSpeedEngine.backward, None if steps is None else set(steps)

    def backward(self: DeepSpeedEngine, loss: Tensor) -> None:
        original(self, change(self, loss) if wanted is None or _now(self) in wanted else loss)

    DeepSpeedEngine.backward = backward


def _forward_loss(steps: Iterable[int] | None, change: Callable[[Tensor], Tensor]) -> None:
    """Replaces the forward pass's language-model loss by `change(loss)` at these steps (None: every step)."""
    original, wanted = DeepSpeedEngine.__call__, None if steps is None else set(steps)

    def forward(self: DeepSpeedEngine, *inputs: Any, **keywords: Any) -> Any:
        output = original(self, *inputs, **keywords)
        if wanted is None or _now(self) in wanted:
            output.lm_loss_sum = change(output.lm_loss_sum)
        return output

    DeepSpeedEngine.__call__ = forward


def nan_loss(*, steps: Iterable[int] | None = None) -> None:
    """The language-model loss is NaN, and so are its gradients."""
    _forward_loss(steps, lambda loss: loss * math.nan)


def inf_loss(*, steps: Iterable[int] | None = None) -> None:
    """The language-model loss is infinite; its gradients, as autograd sees them, are finite."""
    _forward_loss(steps, lambda loss: loss + math.inf)


def inf_gradient(*, steps: Iterable[int] | None = None, parameter: str = "") -> None:
    """The loss is finite; one element of one gradient is infinite. `parameter`: part of that parameter's name."""

    def infinite(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[0] = torch.inf
        return gradient

    def change(engine: DeepSpeedEngine, loss: Tensor) -> Tensor:
        target = next(p for name, p in engine.model.named_parameters() if parameter in name)
        handle = target.register_hook(lambda gradient: (handle.remove(), infinite(gradient))[1])
        return loss

    _before_backward(steps, change)


def spike(*, steps: Iterable[int] | None = None, factor: float) -> None:
    """The loss given to backward is `factor` times too large."""
    _before_backward(steps, lambda engine, loss: loss * factor)


def sleep(*, seconds: float, steps: Iterable[int] | None = None) -> None:
    """Waits `seconds` before the first forward pass of each step."""
    original, wanted = DeepSpeedEngine.__call__, None if steps is None else set(steps)

    def forward(self: DeepSpeedEngine, *inputs: Any, **keywords: Any) -> Any:
        if self._backwards % self.accumulation == 0 and (wanted is None or _now(self) in wanted):
            time.sleep(seconds)
        return original(self, *inputs, **keywords)

    DeepSpeedEngine.__call__ = forward


def stop(*, name: str, steps: Iterable[int], in_save: str = "", save_seconds: float = 0.0) -> None:
    """Sends this process the signal `name` in the middle of each of these steps, and the signal `in_save` during the
    step's save, which then takes `save_seconds` longer."""
    wanted = set(steps)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores SIGINT

    def change(engine: DeepSpeedEngine, loss: Tensor) -> Tensor:
        if engine._backwards % engine.accumulation == 0:
            os.kill(os.getpid(), signal.Signals[name])
        return loss

    _before_backward(wanted, change)
    original = Saver._write_shards

    def write(self: Saver, snapshot: Any, partial: Any) -> dict[str, Any]:
        if snapshot.step in wanted and in_save:  # an earlier step's save may still be under way
            os.kill(os.getpid(), signal.Signals[in_save])
            time.sleep(save_seconds)
        return original(self, snapshot, partial)

    Saver._write_shards = write


def fail(*, steps: Iterable[int]) -> None:
    """A fault of the program: these steps raise RuntimeError, with the environment in a local variable."""
    original, wanted = DeepSpeedEngine.__call__, set(steps)

    def forward(self: DeepSpeedEngine, *inputs: Any, **keywords: Any) -> Any:
        environment = dict(os.environ)
        if _now(self) in wanted:
            raise RuntimeError(f"a fault on purpose, beside {len(environment)} variables")
        return original(self, *inputs, **keywords)

    DeepSpeedEngine.__call__ = forward


def full_disk(*, limit: int) -> None:
    """No file may grow past `limit` bytes: a write fails as on a full disk, without root's rights."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def kill_wandb(*, steps: Iterable[int]) -> None:
    """W&B's service process is killed just before the metrics of these steps are logged."""
    original, wanted = Tracker.log, set(steps)

    def log(self: Tracker, metrics: dict[str, Any]) -> None:
        if metrics["step"] in wanted:
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                if "wandb-core" in Path(f"/proc/{child}/cmdline").read_text():
                    os.kill(int(child), signal.SIGKILL)
        original(self, metrics)

    Tracker.log = log


KINDS: dict[str, Callable[..., None]] = {
    "stop": stop,
    "nan_loss": nan_loss,
    "inf_loss": inf_loss,
    "inf_gradient": inf_gradient,
    "spike": spike,
    "sleep": sleep,
    "full_disk": full_disk,
    "kill_wandb": kill_wandb,
    "fail": fail,
}


def inject(fault: dict[str, Any], rank: int) -> None:
    """Patches this process if `rank` is the fault's rank."""
    fault = dict(fault)
    kind, faulty_rank = fault.pop("kind"), fault.pop("rank", rank)
    if faulty_rank == rank:
        KINDS[kind](**fault)


if __name__ == "__main__":
    from moe.cli.main import main

    inject(json.loads(os.environ["FAULT"]), int(os.environ.get("RANK", "0")))
    main()
