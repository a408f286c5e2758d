"""What torchrun says about this process, read without importing torch."""

from __future__ import annotations

import os
import re

from moe.errors import StartError, shown

MAX_RANKS = 2**17


def world_from_environment() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) as torchrun states them; a plain process is (0, 1, 0, 1).

    Raises StartError naming the variable that is no such number.
    """
    world_size = whole_number("WORLD_SIZE", 1, 1, MAX_RANKS)
    rank = whole_number("RANK", 0, 0, world_size - 1, f": less than WORLD_SIZE={world_size}")
    local_world_size = whole_number("LOCAL_WORLD_SIZE", 1, 1, world_size, f": at most WORLD_SIZE={world_size}")
    # Launchers other than torchrun may not say how many ranks a machine has.
    ranks, among = (local_world_size, "LOCAL_") if "LOCAL_WORLD_SIZE" in os.environ else (world_size, "")
    local_rank = whole_number("LOCAL_RANK", 0, 0, ranks - 1, f": less than {among}WORLD_SIZE={ranks}")
    return rank, world_size, local_rank, local_world_size


def whole_number(variable: str, default: int, low: int, high: int, why: str = "") -> int:
    """The variable's value, or `default`. Raises StartError when it is no whole number from `low` to `high`."""
    text = os.environ.get(variable)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise StartError(
            f"{variable}={shown(text)} must be a whole number from {low} to {high}{why}; torchrun sets it, a single "
            "process needs none",
            prints=True,
        )
    return int(text)
