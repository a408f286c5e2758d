"""Who writes what of a checkpoint: pure functions of names and sizes, so that ranks agree without communication."""

from __future__ import annotations

from moe.checkpoint.layout import key_in_file
from moe.engine.base import MOMENTS

FILE_BYTES = 2 << 30  # of one safetensors file; it is put together in memory


def owned(
    sizes: dict[tuple[str, str], int], experts: set[str], rank: int, world_size: int, expert_parallel_size: int
) -> set[tuple[str, str]]:
    """{(kind, name)} that `rank` writes: each tensor, or each slice of an expert tensor, goes to the one with the
    fewest bytes so far among the ranks that have it.

    `sizes` holds a rank's bytes of each (kind, name), in an order that all ranks share.
    """
    load = [0] * world_size
    mine = set()
    for (kind, name), size in sizes.items():
        slices = expert_parallel_size if name in experts else 1
        for first in range(slices):
            owner = min(range(first, world_size, slices), key=load.__getitem__)
            load[owner] += size
            if owner == rank:
                mine.add((kind, name))
    return mine


def file_numbers(sizes: dict[tuple[str, str], int], file_bytes: int = FILE_BYTES) -> dict[str, int]:
    """Key in the file → number of the file, from 1: as many tensors in each as make about `file_bytes`, twice that in
    the optimizer's, which hold both moments of the same parameters."""
    numbers, number, filled, previous = {}, 1, 0, ""
    for (kind, name), size in sizes.items():
        if kind in MOMENTS and kind != previous:
            filled, number, previous = 0, 1, kind
        if filled and filled + size > file_bytes:
            filled, number = 0, number + 1
        filled += size
        numbers[key_in_file(kind, name)] = number
    return numbers
