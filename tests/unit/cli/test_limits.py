"""What counts as a lack of memory, and what doesn't."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moe.cli.limits import out_of_memory


def raised(action: Callable[[], object]) -> Exception:
    with pytest.raises((MemoryError, RuntimeError, ImportError)) as caught:
        action()
    return caught.value


def fail(error: Exception) -> None:
    raise error


def test_other_errors_are_no_lack_of_memory() -> None:
    assert out_of_memory(raised(lambda: fail(RuntimeError("shapes differ")))) is None
    assert out_of_memory(raised(lambda: fail(ImportError("no module")))) is None
    line = out_of_memory(raised(lambda: bytes(1 << 60)))
    assert line is not None
    assert line.startswith("out of memory: MemoryError"), line
    assert len(line.splitlines()) == 1
