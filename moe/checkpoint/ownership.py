"""Who writes what of a checkpoint: pure functions of names and sizes, so that ranks need not ask each other."""

from __future__ import annotations

from moe.engine.base import KINDS

FILE_BYTES = 2 << 30  # of one safetensors file; it is put together in memory


def owned(sizes: dict[str, int], experts: set[str], rank: int, world_size: int, degree: int) -> set[tuple[str, str]]:
    """{(kind, parameter name)} that `rank` writes: each tensor, or each slice of an expert tensor, goes to the one
    with the fewest elements so far among the ranks that have it."""
    load = [0] * world_size
    mine = set()
    for kind in KINDS:
        for name, size in sizes.items():
            slices = degree if name in experts else 1
            for first in range(slices):
                owner = min(range(first, world_size, slices), key=load.__getitem__)
                load[owner] += size
                if owner == rank:
                    mine.add((kind, name))
    return mine


def file_numbers(sizes: dict[str, int]) -> dict[str, int]:
    """Name in the file → number of the file, from 1: as many tensors in each as make about `FILE_BYTES`."""
    numbers, number = {}, 1
    for kind in KINDS:
        filled, number = 0, 1
        for name, size in sizes.items():
            if filled and filled + 4 * size > FILE_BYTES:
                filled, number = 0, number + 1
            filled += 4 * size
            numbers[name if kind == "weights" else f"{kind}.{name}"] = number
    return numbers
