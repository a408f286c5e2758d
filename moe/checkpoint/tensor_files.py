"""Writes the tensors of a checkpoint.

torch.distributed.checkpoint loads SymPy and many other modules, for a second: whoever needs this module imports it
when there is something to write, so that no run waits for it before its first step.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from moe.checkpoint.shards import os_error


class _Recorded(FileSystem):
    """Appends the path of each file that is written to `written`, when it is opened."""

    def __init__(self, written: list[Path]) -> None:
        super().__init__()
        self._written = written

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        self._written.append(Path(path))
        with super().create_stream(path, mode) as stream:
            yield stream


def write_tensors(
    folder: Path,
    tensors: dict[str, Tensor],
    file_numbers: dict[str, int],
    written: list[Path],
    group: dist.ProcessGroup | None = None,
) -> None:
    """This rank's part of `tensors` into files of its own; `file_numbers` tells which of them each goes to. Each file's
    path is appended to `written` as soon as it is opened. A collective of `group`; without one, this process alone.
    Raises OSError, on all ranks when any failed."""
    try:
        writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=file_numbers, save_distributed=True)
        writer.fs = _Recorded(written)
        writer.per_thread_copy_ahead = 0  # tensors are in host memory: no stream of training's to wait for
        state_dict_saver.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # not an Exception
        first = next(iter(error.failures.values()))[0]
        raise OSError(f"{folder.parent}: could not be written ({first})") from os_error(first) or error
