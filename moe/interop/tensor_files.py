"""safetensors files, read and written one tensor at a time: an 8-byte length, a JSON header, then the tensors' bytes.

Files are read by position, not mapped into memory: a mapping counts against the process's limit on address space. A
file's header is checked as a whole when it is opened: each tensor's bytes must lie in the file, next to each other.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.durable import fsync
from moe.errors import UserError
from moe.untrusted import is_count, open_regular, shown

LARGEST_HEADER = 100 << 20  # bytes; the format's own limit
MAX_BYTES = 2**63 - 1
ALIGNMENT = 8  # bytes that a header's length is a multiple of, so that tensors are aligned
METADATA = "__metadata__"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's bytes lie: `start` counts from the beginning of the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, first: int = 0, count: int | None = None) -> Tensor:
        """The tensor, or `count` slices of its first dimension from `first` on. Raises UserError, OSError."""
        shape = self.shape if count is None else (count, *self.shape[1:])
        out = torch.empty(shape, dtype=self.dtype)
        self.read_into(out, first)
        return out

    def read_into(self, out: Tensor, first: int = 0) -> None:
        """Fills the contiguous tensor `out`, of this dtype, with as many slices of the first dimension, from `first` on
        (of a scalar, with itself)."""
        assert out.dtype == self.dtype
        assert out.is_contiguous()
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        view = _bytes_of(out)
        with open_regular(self.path) as file:
            file.seek(self.start + first * row)
            filled = 0
            while filled < len(view):
                got = file.readinto(view[filled:])
                if not got:
                    raise UserError(f"{self.path}: ends {len(view) - filled:,} bytes too early: copy it again")
                filled += got


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """({name: where it lies}, the file's metadata) of a safetensors file. Raises UserError naming the file, OSError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            raise UserError(
                f"{path}: its header would take {length:,} bytes of the file's {size:,}: it is no safetensors file, or "
                "its end is missing; copy it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its header is not valid JSON ({error}): copy the file again") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header must be a JSON object, not {shown(header)}")
    metadata = header.pop(METADATA, None) or {}
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: {METADATA} must be an object, not {shown(metadata)}")
    tensors, spans = {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = _checked(path, name, entry)
        tensors[name] = StoredTensor(path, dtype, shape, 8 + length + begin)
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise UserError(f"{path}: {name} begins at byte {begin:,} of the data instead of {at:,}: copy it again")
        at = end
    if 8 + length + at != size:
        raise UserError(
            f"{path}: has {size:,} bytes, and its header says {8 + length + at:,}: it was not copied to its end; copy "
            "it again"
        )
    return tensors, metadata


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name is there twice")
    return values


def _checked(path: Path, name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, byte after the last) of a header's entry."""
    where = f"{path}: {shown(name)}"
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be an object, not {shown(entry)}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{where}: dtype={shown(dtype)} must be one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(is_count(one, 2**40) for one in shape) or len(shape) > 8:
        raise UserError(f"{where}: shape={shown(shape)} must be a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(one, MAX_BYTES) for one in offsets):
        raise UserError(f"{where}: data_offsets={shown(offsets)} must be two positions")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise UserError(f"{where}: has {end - begin:,} bytes, and {dtype} of shape {shape} takes {needed:,}")
    return DTYPES[dtype], tuple(shape), begin, end


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensor_file(
    path: Path, tensors: dict[str, TensorInfo], data: Iterable[Tensor], metadata: dict[str, str] | None = None
) -> dict[str, Any]:
    """Writes a new safetensors file and flushes it to disk. `data` yields the tensors' content in their order; one
    tensor may come in several consecutive pieces. Returns its number of bytes and SHA-256. Raises OSError."""
    header: dict[str, Any] = {METADATA: metadata or {"format": "pt"}}
    at = 0
    for name, info in tensors.items():
        header[name] = {
            "dtype": NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [at, at + info.nbytes],
        }
        at += info.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % ALIGNMENT)
    digest, written = hashlib.sha256(), 0
    with path.open("xb") as file:
        for block in _blocks(raw, data):
            file.write(block)
            digest.update(block)
            written += len(block)
    assert written == 8 + len(raw) + at, f"{path}: {written} bytes instead of {8 + len(raw) + at}"
    fsync(path)
    return {"bytes": written, "sha256": digest.hexdigest()}


def _blocks(header: bytes, data: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    for tensor in data:
        yield _bytes_of(tensor.detach().contiguous())


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
