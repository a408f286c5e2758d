"""What a resume needs beside the tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moe import __version__
from moe.checkpoint.layout import STATE
from moe.errors import UserError


def _versions() -> dict[str, str]:
    return {"moe": __version__, "torch": torch.__version__, "deepspeed": version("deepspeed")}


RENAMED = {"refused_in_a_row": "skipped_in_a_row"}  # name in older checkpoints → today's


@dataclass(kw_only=True, slots=True)
class TrainState:
    """All that a resume needs beside the tensors. `consumed` is the loader's whole state (samples, all ranks);
    `elapsed` is in seconds of training, without the time between a stop and the resume; `recent_norms` and
    `skipped_in_a_row` are the guard's (`moe.train.guard`), `alarm` is what the alarm remembers (`moe.train.alarm`),
    `choices` are the last evaluation's (`moe.train.held_out`)."""

    step: int = 0
    consumed: int = 0
    tokens: int = 0
    elapsed: float = 0.0
    skipped_steps: int = 0
    recent_norms: list[float] = field(default_factory=list)
    skipped_in_a_row: int = 0
    alarm: dict[str, Any] = field(default_factory=dict)
    choices: str = ""
    tokenizer: str = ""
    data: str = ""
    versions: dict[str, str] = field(default_factory=_versions)


def read_state(folder: Path) -> TrainState:
    """Raises UserError naming the file."""
    path = folder / STATE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values = {RENAMED.get(name, name): value for name, value in values.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a training state ({error!r})") from error
    for name, value in values.items():
        rule = next((rule for names, holds, rule in _RULES if name in names and not holds(value)), None)
        if rule is not None:
            raise UserError(f"{path}: {name}={str(value)[:40]} must be {rule}; use another checkpoint")
    return TrainState(**{field.name: values[field.name] for field in fields(TrainState) if field.name in values})


def _is_real(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


_RULES: list[tuple[tuple[str, ...], Callable[[Any], bool], str]] = [
    (
        ("step", "consumed", "tokens", "skipped_steps", "skipped_in_a_row"),
        lambda value: type(value) is int and 0 <= value < 2**63,
        "a whole number ≥ 0",
    ),
    (("elapsed",), _is_real, "a finite number ≥ 0"),
    (
        ("recent_norms",),
        lambda value: isinstance(value, list) and all(map(_is_real, value)),
        "a list of finite numbers ≥ 0",
    ),
    (("alarm",), lambda value: isinstance(value, dict), "a mapping"),
    (("tokenizer", "data", "choices"), lambda value: isinstance(value, str), "text"),
    (
        ("versions",),
        lambda value: isinstance(value, dict) and all(isinstance(one, str) for one in value.values()),
        "a mapping of names to versions",
    ),
]
