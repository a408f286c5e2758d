"""Memory that is given back: its elements are 0, and the process is smaller."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe.engine import heap

MIB = 2**20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * heap.mmap.PAGESIZE


@pytest.mark.parametrize(("begin", "numel"), [(0, 1), (3, 100), (1, 4096), (5, 100_000), (1024, 16 * 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_released_elements_are_zero_and_their_neighbours_stay(begin: int, numel: int, dtype: torch.dtype) -> None:
    whole = torch.ones(begin + numel + 7, dtype=dtype)
    heap.release(whole[begin : begin + numel])
    assert not whole[begin : begin + numel].any()
    assert whole.sum() == begin + 7
    whole[begin : begin + numel] = 2
    assert whole[begin : begin + numel].double().sum() == 2 * numel


def test_a_released_tensor_takes_no_memory() -> None:
    large = torch.ones(16 * MIB)
    before = _resident()
    heap.release(large)
    assert before - _resident() > 60 * MIB
    assert not large.any()


def test_where_the_kernel_keeps_the_pages_elements_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses:
        def madvise(self, *_: int) -> int:
            return -1

    monkeypatch.setattr(heap, "LIBC", Refuses())
    large = torch.ones(MIB)
    heap.release(large)
    heap.trim()  # nor has it malloc_trim
    assert not large.any()


def test_the_heap_gives_back_what_is_free() -> None:
    pieces = [torch.ones(8 * 1024) for _ in range(2048)]  # 32 KiB each: from the heap, not mapped one by one
    kept = pieces[1::2]
    del pieces
    before = _resident()
    heap.trim()
    assert before - _resident() > 24 * MIB
    assert all(piece.all() for piece in kept)
