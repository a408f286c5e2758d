"""Checks whose failure is one line for the user."""

from __future__ import annotations

from collections.abc import Callable

from moe.errors import UserError

# What no run needs more of: products of a few stay far from overflow, in memory plans and in int64 sample numbers.
MAX_COUNT = 10**9
# Beyond these, float32 has infinity or zero instead of the number.
MIN_REAL, MAX_REAL = 1e-37, 1e37
MAX_SEED = 2**64 - 1  # torch's generators and the order of samples take 64 bits


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` (key, value, rule) unless `condition`."""
    if not condition:
        raise UserError(message)


def positive(prefix: str, owner: object, *names: str, at_most: int = MAX_COUNT) -> None:
    """Fields that must be > 0 where they are set: whole numbers ≤ `at_most`, others within float32's range."""
    _numbers(prefix, owner, names, lambda value: value > 0, "> 0", at_most)


def not_negative(prefix: str, owner: object, *names: str) -> None:
    """Fields that must be ≥ 0 where they are set, and as large as `positive` allows."""
    _numbers(prefix, owner, names, lambda value: value >= 0, "≥ 0", MAX_COUNT)


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
        require(0 <= value < 1, f"{_key(prefix, name)}={value} must be in [0, 1)")


def is_seed(prefix: str, owner: object, *names: str) -> None:
    """Fields that must be in [0, 2**64)."""
    _numbers(prefix, owner, names, lambda value: value >= 0, "≥ 0", MAX_SEED)


def _numbers(
    prefix: str, owner: object, names: tuple[str, ...], holds: Callable[[float], bool], rule: str, at_most: int
) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is None:
            continue
        stated = f"{_key(prefix, name)}={value}"
        require(holds(value), f"{stated} must be {rule}")  # NaN fails every comparison
        if isinstance(value, int):
            require(value <= at_most, f"{stated} must be ≤ {at_most}")
        else:
            require(value <= MAX_REAL, f"{stated} must be ≤ {MAX_REAL:g}: float32 has no larger numbers")
            require(value == 0 or value >= MIN_REAL, f"{stated} must be ≥ {MIN_REAL:g}: float32 has no smaller numbers")


def _key(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
