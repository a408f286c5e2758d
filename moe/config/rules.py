"""Checks that raise a one-line UserError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe.errors import UserError, shown

# More than any run needs; the product of two still fits in int64, as sample numbers must.
MAX_COUNT = 10**9
# Outside this range float32 overflows to infinity or underflows to zero.
MIN_REAL, MAX_REAL = 1e-37, 1e37
# A value that must be stated: omegaconf.MISSING, without its import, which takes longer than all of this package.
MISSING: Any = "???"
MAX_SEED = 2**64 - 1  # torch's generators and the order of samples take 64 bits


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` (key, value, rule, fix) unless `condition`."""
    if not condition:
        raise UserError(message)


def positive(prefix: str, owner: object, *names: str, at_most: int = MAX_COUNT) -> None:
    """Requires fields that are not None to be > 0; integers also ≤ `at_most`, floats also within float32's range."""
    _numbers(prefix, owner, names, lambda value: value > 0, "> 0", at_most)


def not_negative(prefix: str, owner: object, *names: str) -> None:
    """Requires fields that are not None to be ≥ 0, with the upper limits of `positive`."""
    _numbers(prefix, owner, names, lambda value: value >= 0, "≥ 0", MAX_COUNT)


def filled(prefix: str, owner: object, *names: str) -> None:
    """Requires strings that are not None to be non-blank: in a shell, `KEY=$UNSET` passes an empty one."""
    for name in names:
        value = getattr(owner, name)
        key = f"{prefix}.{name}" if prefix else name
        require(value is None or bool(value.strip()), f"{key}={value!r} is empty: give a value or leave the key out")


def is_utf8(name: str, text: str | None) -> None:
    """Requires what a command line or a pipe gave to be UTF-8: Python has a lone surrogate for any other byte."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}{shown(error.object)} is not UTF-8: type it, or save it, as UTF-8") from error


def share(prefix: str, owner: object, *names: str) -> None:
    """Requires fields to be in [0, 1)."""
    for name in names:
        value = getattr(owner, name)
        require(0 <= value < 1, f"{_key(prefix, name)}={value} must be in [0, 1)")


def is_seed(prefix: str, owner: object, *names: str) -> None:
    """Requires fields to be in [0, 2**64)."""
    _numbers(prefix, owner, names, lambda value: value >= 0, "≥ 0", MAX_SEED)


def default_of(owner: Any, name: str) -> object:
    """The default of a dataclass's field."""
    one = owner.__dataclass_fields__[name]
    return one.default_factory() if callable(one.default_factory) else one.default


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
