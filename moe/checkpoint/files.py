"""Writes the files of a checkpoint, into a folder that gets its final name later."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from moe.checkpoint.layout import CONFIG, MANIFEST, STATE, TOKENIZER, sha256
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


def write_tensors(
    folder: Path, tensors: dict[str, Tensor], file_numbers: dict[str, int], group: dist.ProcessGroup | None = None
) -> None:
    """This rank's part of `tensors` into files of its own; `file_numbers` tells which of them each goes to. A
    collective of `group`; without one, this process alone. Raises OSError, on all ranks when any failed."""
    try:
        writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=file_numbers, save_distributed=True)
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


def listed(folder: Path) -> list[Path]:
    """Empty when it is missing: another process may rename it at any moment."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def bytes_now(path: Path) -> int:
    """The file's current size, also where another node writes it (NFS asks the server when a file is opened); −1 if it
    is missing."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return -1


def entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
