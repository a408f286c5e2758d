"""Reads the tensors of one part of a checkpoint, from the safetensors files that the manifest lists and no others."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moe.adapters.merge import is_part
from moe.checkpoint.untrained import empty_parts, untrained_tensors
from moe.errors import UserError

READ_BYTES = 2 << 30  # of tensors that a rank reads at once


def os_error(error: BaseException) -> OSError | None:
    """The OSError that safetensors tells of, whose own exceptions have its number in their text only."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\((?:os error )?(\d+)\)", str(error))
    return OSError(int(number[1]), str(error)) if number else None


class _Listed(FileSystem):
    """torch's reader takes every file that this lists."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self._names = list(names)

    def ls(self, path: str | Path) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return [str(Path(path) / name) for name in self._names]


class ShardReader(HuggingFaceStorageReader):
    """`names` are the files of `folder` to read. Opens each file's header once, however often tensors are read."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        super().__init__(str(folder))
        self.fs = _Listed(names)
        self._metadata: Any = None

    def read_metadata(self) -> Any:
        """Raises OSError where a file can't be opened or read."""
        if self._metadata is None:
            try:
                self._metadata = super().read_metadata()
            except OSError:
                raise
            except Exception as error:
                if failed := os_error(error):
                    raise failed from error
                raise
        return self._metadata

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """{name: whole size, dtype and the slices of it that the files hold}."""
        return self.read_metadata().state_dict_metadata

    def flaw(self, expected: set[str] | None = None) -> str | None:
        """What keeps the files from holding each tensor (of `expected`, where given, and no other) exactly once."""
        tensors = self.tensors()
        if expected is not None and tensors.keys() != expected:
            name = min(tensors.keys() ^ expected)
            return f"{name} is {'missing' if name in expected else 'not one of the tensors to save'}"
        for name, tensor in tensors.items():
            end = 0
            for chunk in sorted(tensor.chunks, key=lambda chunk: tuple(chunk.offsets)):
                start = chunk.offsets[0] if chunk.offsets else 0
                whole = not any(chunk.offsets[1:]) and chunk.sizes[1:] == tensor.size[1:]
                if not whole or start > end:
                    return f"{name} lacks rows {end} to {start - 1}"
                if start < end:
                    return f"{name} is there more than once"
                end += chunk.sizes[0] if chunk.sizes else 1
            if end != (tensor.size[0] if tensor.size else 1) and math.prod(tensor.size):
                return f"{name} lacks rows from {end} on"
        return None

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Raises UserError, OSError."""
        try:
            state_dict_loader.load(tensors, storage_reader=self, no_dist=True)
        except CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            if failed := os_error(first):
                raise failed from error
            raise UserError(f"{self.path}: does not fit this model ({first})") from error

    def fill_untrained(
        self,
        model: nn.Module,
        sharded: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors,
        *,
        adapters: bool = True,
    ) -> None:
        """The tensors of `model` that no optimizer updates, those of `adapters` too. Raises UserError if shapes or
        dtypes differ."""
        tensors = {name: one for name, one in untrained_tensors(model).items() if adapters or not is_part(name)}
        for part in empty_parts(tensors, READ_BYTES):
            buffers = {name: value for name, value in part.items() if not isinstance(tensors[name], nn.Parameter)}
            self._check_dtypes(buffers)
            self.fill(sharded(part))
            for name, value in part.items():
                tensors[name].detach().copy_(value)

    def _check_dtypes(self, buffers: dict[str, Tensor]) -> None:
        for name, buffer in buffers.items():
            saved: torch.dtype = self.tensors()[name].properties.dtype if name in self.tensors() else buffer.dtype
            if saved != buffer.dtype:
                raise UserError(
                    f"{self.path}: does not fit this model ({name} is {saved}, the model's is {buffer.dtype})"
                )
