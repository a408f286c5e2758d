"""Writes the files of a checkpoint, into a folder that gets its final name later."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from moe.checkpoint.layout import CONFIG, MANIFEST, STATE, TOKENIZER
from moe.checkpoint.manifest import entry
from moe.checkpoint.state import TrainState
from moe.durable import write_durably


class SavedTokenizer(Protocol):
    """The part of `moe.data.tokenizer.Tokenizer` that a checkpoint holds."""

    fingerprint: str

    def files(self) -> dict[str, bytes]:
        """{name in the folder: content}."""
        ...


def small_files(state: TrainState, config_yaml: str, tokenizer: SavedTokenizer | None) -> dict[str, bytes]:
    """{name in the checkpoint: content} of all that isn't a tensor or the manifest."""
    files = {STATE: (json.dumps(asdict(state), indent=1) + "\n").encode(), CONFIG: config_yaml.encode()}
    if tokenizer is not None:
        files |= {f"{TOKENIZER}/{name}": content for name, content in tokenizer.files().items()}
    return files


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
        raise OSError(f"{folder.parent}: could not be written ({first})") from error


def write_small_files(folder: Path, files: dict[str, bytes], manifest: dict[str, Any]) -> None:
    """The rest of a checkpoint, the manifest last. Raises OSError."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_durably(folder / name, content)
        manifest[name] = entry(folder / name)
    write_durably(folder / MANIFEST, json.dumps(manifest, indent=1))  # a truncated manifest doesn't parse


def bytes_now(path: Path) -> int:
    """The file's current size, also where another node writes it (NFS asks the server when a file is opened); −1 if it
    is missing."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return -1
