"""Writes the small files of a checkpoint, into a folder that gets its final name later."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

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
