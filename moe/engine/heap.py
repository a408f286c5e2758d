"""Gives memory that a process has freed, or doesn't need the contents of, back to the kernel."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

LIBC = ctypes.CDLL(None)
LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def release(tensor: Tensor) -> None:
    """Gives back the pages of a contiguous CPU tensor, whose elements are 0 from then on (on Linux). Writing to them
    allocates them again. Where the kernel keeps the pages (hugetlbfs), and at the tensor's ends, elements are set to 0
    in place."""
    begin = tensor.data_ptr()
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (begin + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if first >= last or LIBC.madvise(first, last - first, mmap.MADV_DONTNEED):
        tensor.zero_()
        return
    values = tensor.view(-1)
    values[: (first - begin) // tensor.element_size()].zero_()
    values[(last - begin) // tensor.element_size() :].zero_()


def trim() -> None:
    """Gives back what is free in glibc's heap; another allocator's heap stays as it is."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)
