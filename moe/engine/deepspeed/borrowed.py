"""Checks every DeepSpeed internal when it is looked up: that it exists and has the expected parameters.

Another version could rename one, or no longer call it, without an error: clipping, or a step's norm, would silently be
missing. That DeepSpeed still uses them as expected is checked at every step (`DeepSpeedEngine.step`).
"""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any

from moe.errors import UserError

WRITTEN_FOR = "0.19.8"  # as pinned in pyproject.toml


def check_version() -> None:
    """Raises UserError if another version of DeepSpeed is installed."""
    installed = version("deepspeed")
    if installed != WRITTEN_FOR:
        raise UserError(
            f"deepspeed {installed} is installed, but engine=deepspeed uses insides of {WRITTEN_FOR}: "
            f"pip install deepspeed=={WRITTEN_FOR}, or use engine=plain (one process)"
        )


def borrow(owner: Any, name: str, *parameters: str, lost: str) -> Any:
    """`owner.name`, a function with exactly these `parameters`; `lost`: what would silently go wrong without it.

    Raises RuntimeError if it is missing or has other parameters.
    """
    function = borrow_value(owner, name, lost=lost)
    if not callable(function):
        raise _moved(owner, name, "is no function", lost)
    found = tuple(inspect.signature(function).parameters)
    if found != parameters:
        raise _moved(owner, name, f"takes ({', '.join(found)}), not ({', '.join(parameters)})", lost)
    return function


def borrow_value(owner: Any, name: str, *, lost: str) -> Any:
    """`owner.name`, of any type. Raises RuntimeError if it is missing."""
    if not hasattr(owner, name):
        raise _moved(owner, name, "is gone", lost)
    return getattr(owner, name)


def require_meaning(holds: bool, what: str) -> None:
    """Raises RuntimeError unless DeepSpeed did `what`, which the code around it relies on."""
    if not holds:
        raise RuntimeError(f"deepspeed {version('deepspeed')} no longer does what {WRITTEN_FOR} did: {what}")


def _moved(owner: Any, name: str, how: str, lost: str) -> RuntimeError:
    where = getattr(owner, "__name__", None) or type(owner).__name__
    return RuntimeError(
        f"deepspeed {version('deepspeed')}: {where}.{name} {how} ({WRITTEN_FOR} had it otherwise); without it {lost}"
    )
