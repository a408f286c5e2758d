"""What all ranks agree on when an action fails on one of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moe.distributed import rendezvous
from moe.errors import UserError
from tests.ranks import run_ranks


def _user_error(rank: int) -> int:
    if rank == 1:
        raise UserError("data.path=x must exist")
    return rank


def _disk(rank: int) -> int:
    if rank == 1:
        raise OSError(28, "No space left on device", "/full/file")
    return rank


def _broken_device(rank: int) -> int:
    if rank == 1:
        raise UserError("data.cache_dir=/x: can't write /x/y") from OSError(5, "Input/output error", "/x/y")
    return rank


def _fault(rank: int) -> int:
    if rank == 1:
        list(zip([1], [1, 2], strict=True))  # a ValueError, but of ours
    return rank


def _fault_and_user_error(rank: int) -> int:
    if rank == 0:
        raise UserError("a message that would hide the fault")
    return max([])


def _agreed(action: Callable[[int], int]) -> tuple[str, str]:
    mesh = rendezvous.start(1)
    try:
        mesh.agree(lambda: action(mesh.rank), "reading")
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (_user_error, [("UserError", "data.path=x must exist (on rank 1)")] * 2),
        (_disk, [("OSError", "reading: [Errno 28] No space left on device: '/full/file' (on rank 1)")] * 2),
        (_broken_device, [("OSError", "data.cache_dir=/x: can't write /x/y (on rank 1)")] * 2),
        (
            _fault,
            [
                (
                    "OtherRankFailed",
                    "rank 1 failed: reading: ValueError: zip() argument 2 is longer than argument 1 (its own output "
                    "has the traceback)",
                ),
                ("ValueError", "zip() argument 2 is longer than argument 1"),
            ],
        ),
        (
            _fault_and_user_error,
            [
                (
                    "OtherRankFailed",
                    "rank 1 failed: reading: ValueError: max() arg is an empty sequence (its own output has the "
                    "traceback)",
                ),
                ("ValueError", "max() arg is an empty sequence"),
            ],
        ),
    ],
    ids=["user error", "disk", "broken device", "fault", "fault beside a user error"],
)
def test_every_rank_ends_and_says_why(action: Callable[[int], int], expected: list[tuple[str, str]]) -> None:
    assert run_ranks(2, _agreed, action) == expected
