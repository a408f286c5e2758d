"""What torchrun says about this process, read without importing torch."""

from __future__ import annotations

import os


def world_from_environment() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) as torchrun states them; a plain process is (0, 1, 0, 1)."""
    read = os.environ.get
    return (
        int(read("RANK", "0")),
        int(read("WORLD_SIZE", "1")),
        int(read("LOCAL_RANK", "0")),
        int(read("LOCAL_WORLD_SIZE", "1")),
    )
