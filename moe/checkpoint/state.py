"""What a resume needs beside the tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moe import __version__
from moe.checkpoint.layout import STATE
from moe.errors import UserError
from moe.untrusted import is_real, read_object


def _versions() -> dict[str, str]:
    return {"moe": __version__, "torch": torch.__version__, "deepspeed": version("deepspeed")}


MAX_SECONDS = 10**10
RENAMED = {"refused_in_a_row": "skipped_in_a_row"}  # name in older checkpoints → today's


@dataclass(kw_only=True, slots=True)
class TrainState:
    """All that a resume needs beside the tensors. `consumed` is the loader's whole state (samples, all ranks);
    `elapsed` is in seconds of training, without the time between a stop and the resume; `recent_norms` and
    `skipped_in_a_row` are the guard's (`moe.train.guard`), `alarm` is what the alarm remembers (`moe.train.alarm`),
    `choices` are the last evaluation's (`moe.train.held_out`), `best` is the best of them
    (`moe.train.best`). An adapter's frozen weights are those of the checkpoint
    `base` (inside the run directory if the path is relative), whose `model_fingerprint` was `base_fingerprint`."""

    step: int = 0
    consumed: int = 0
    tokens: int = 0
    elapsed: float = 0.0
    skipped_steps: int = 0
    recent_norms: list[float] = field(default_factory=list)
    skipped_in_a_row: int = 0
    alarm: dict[str, Any] = field(default_factory=dict)
    choices: str = ""
    best: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = ""
    data: str = ""
    base: str = ""
    base_fingerprint: str = ""
    versions: dict[str, str] = field(default_factory=_versions)


def read_state(folder: Path) -> TrainState:
    """Raises UserError naming the file and the key."""
    path = folder / STATE
    try:
        values = read_object(path, FIX)
    except OSError as error:
        raise UserError(f"{path}: not a training state ({error.strerror})") from error
    values.values.update({new: values.values.pop(old) for old, new in RENAMED.items() if old in values.values})
    state = TrainState(
        step=values.count("step"),
        consumed=values.count("consumed"),
        tokens=values.count("tokens"),
        tokenizer=values.text("tokenizer"),
        data=values.text("data"),
    )
    for name in ("skipped_steps", "skipped_in_a_row"):
        if name in values.values:
            setattr(state, name, values.count(name, at_most=state.step))
    for name, (holds, rule) in _RULES.items():
        if name in values.values:
            setattr(state, name, values.take(name, holds, rule))
    return state


FIX = "use another checkpoint"


def _is_amount(value: Any) -> bool:
    return is_real(value) and value >= 0


# Of what a checkpoint of an earlier version may lack.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "elapsed": (lambda value: _is_amount(value) and value <= MAX_SECONDS, f"a number from 0 to {MAX_SECONDS}"),
    "recent_norms": (
        lambda value: isinstance(value, list) and all(map(_is_amount, value)),
        "a list of finite numbers ≥ 0",
    ),
    "alarm": (lambda value: isinstance(value, dict), "a mapping"),
    "best": (lambda value: isinstance(value, dict), "a mapping"),
    "choices": (lambda value: isinstance(value, str), "text"),
    "base": (lambda value: isinstance(value, str) and "\0" not in value, "text"),
    "base_fingerprint": (lambda value: isinstance(value, str), "text"),
    "versions": (
        lambda value: isinstance(value, dict) and all(isinstance(one, str) for one in value.values()),
        "a mapping of names to versions",
    ),
}
