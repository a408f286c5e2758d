"""Where a checkpoint's files are, and whether they are whole. They are safetensors and JSON, no pickle; they load at
any number of ranks and any expert-parallel size.

    RUN_DIR/checkpoints/latest                     text: the newest folder's name
    RUN_DIR/checkpoints/step_00000200/model/       float32 weights under transformers' names, experts stacked; buffers
                                      optimizer/   exp_avg.NAME and exp_avg_sq.NAME
                                      state.json   TrainState
                                      config.yaml  the run's configuration
                                      manifest.json  size and SHA-256 of every file above
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from moe.engine.base import ADAM_MOMENTS

NAME = re.compile(r"step_\d{8,}")
MANIFEST = "manifest.json"
TEXTS = {"state.json", "config.yaml"}

FIXED = "fixed"  # a kind beside the engine's: tensors of the model that no optimizer updates (`moe.checkpoint.fixed`)


def key_in_file(kind: str, name: str) -> str:
    return f"{kind}.{name}" if kind in ADAM_MOMENTS else name


def committed(folder: Path) -> list[Path]:
    """Whole checkpoints, newest first. Raises OSError when the folder is there but can't be read: it may be full."""
    try:
        found = [entry.name for entry in os.scandir(folder) if NAME.fullmatch(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        return []
    return sorted((folder / name for name in found), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """None if the manifest's files are there with their size and SHA-256, else what is wrong.

    Of several callers each takes every `parts`-th file, beginning with number `part`.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not manifest.keys() >= TEXTS:
            return f"{MANIFEST} doesn't list {' and '.join(sorted(TEXTS - manifest.keys()))}"
        for name, expected in sorted(manifest.items())[part::parts]:
            path = folder / name
            if not path.is_file():
                return f"{name} of {MANIFEST} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {MANIFEST} says {expected['bytes']}"
            if sha256(path) != expected["sha256"]:
                return f"{name} does not match its SHA-256 in {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} can't be read ({error})"
    return None
