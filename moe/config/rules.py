"""Checks whose failure is one line for the user."""

from __future__ import annotations

import math

from moe.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` (key, value, rule) unless `condition`."""
    if not condition:
        raise UserError(message)


def positive(prefix: str, owner: object, *names: str) -> None:
    """Fields that must be finite and > 0 where they are set."""
    for name in names:
        value = getattr(owner, name)
        require(value is None or (value > 0 and math.isfinite(value)), f"{prefix}.{name}={value} must be > 0")


def not_negative(prefix: str, owner: object, *names: str) -> None:
    """Fields that must be finite and ≥ 0 where they are set."""
    for name in names:
        value = getattr(owner, name)
        require(value is None or (math.isfinite(value) and value >= 0), f"{prefix}.{name}={value} must be ≥ 0")


def filled(prefix: str, owner: object, *names: str) -> None:
    """Texts that must not be blank where they are set: `KEY=$UNSET` in a shell gives an empty one."""
    for name in names:
        value = getattr(owner, name)
        key = f"{prefix}.{name}" if prefix else name
        require(value is None or bool(value.strip()), f"{key}={value!r} is empty: give a value or leave the key out")


def share(prefix: str, owner: object, *names: str) -> None:
    """Fields that must be in [0, 1)."""
    for name in names:
        value = getattr(owner, name)
        require(0 <= value < 1, f"{prefix}.{name}={value} must be in [0, 1)")
