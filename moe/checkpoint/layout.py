"""Where a checkpoint's files are, and whether they are whole. They are safetensors, JSON and the tokenizer's files, no
pickle; they load at any number of ranks and any expert-parallel size.

    RUN_DIR/checkpoints/latest                     text: the newest folder's name
    RUN_DIR/checkpoints/step_00000200/model/       float32 weights under transformers' names, experts stacked; buffers
                                      optimizer/   exp_avg.NAME and exp_avg_sq.NAME of the weights that train
                                      tokenizer/   what moe.data.tokenizer.load_saved reads
                                      state.json   TrainState
                                      config.yaml  the run's configuration
                                      manifest.json  size and SHA-256 of every file above

A folder that holds a model only has no `optimizer/`, and its weights have the model's dtype. Earlier versions wrote the
tokenizer to RUN_DIR/tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from moe.engine.base import ADAM_MOMENTS

CHECKPOINTS = "checkpoints"
LATEST = "latest"
MODEL, OPTIMIZER = "model", "optimizer"
PARTS = (MODEL, OPTIMIZER)  # folders of safetensors
TOKENIZER = "tokenizer"
STATE = "state.json"
CONFIG = "config.yaml"
MANIFEST = "manifest.json"
STEP = "step_"  # and its number, in a checkpoint's name
NAME = re.compile(rf"{STEP}\d{{8,}}")

UNTRAINED = "untrained"  # a kind beside the engine's: what no optimizer updates (`moe.checkpoint.untrained`)


def folder_name(step: int) -> str:
    return f"{STEP}{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(STEP))


def part_of(kind: str) -> str:
    """The folder that tensors of this kind are in."""
    return OPTIMIZER if kind in ADAM_MOMENTS else MODEL


def key_in_file(kind: str, name: str) -> str:
    return f"{kind}.{name}" if kind in ADAM_MOMENTS else name


def tokenizer_folder(checkpoint: Path) -> Path:
    """Where the tokenizer of this checkpoint's model is."""
    inside = checkpoint / TOKENIZER
    return inside if inside.is_dir() else checkpoint.resolve().parent.parent / TOKENIZER


def committed(folder: Path) -> list[Path]:
    """Whole checkpoints, newest first. Raises OSError when the folder is there but can't be read: it may be full."""
    try:
        found = [entry.name for entry in os.scandir(folder) if NAME.fullmatch(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        return []
    return sorted((folder / name for name in found), key=step_of, reverse=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """None if the manifest's files are there with their size and SHA-256, else what is wrong.

    Of several callers each takes every `parts`-th file, beginning with number `part`.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not manifest.keys() >= {STATE, CONFIG}:
            return f"{MANIFEST} doesn't list {' and '.join(sorted({STATE, CONFIG} - manifest.keys()))}"
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
