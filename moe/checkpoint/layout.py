"""Where a checkpoint's files are. They are safetensors, JSON and the tokenizer's files, no
pickle; they load at any number of ranks and any expert-parallel size.

    RUN_DIR/checkpoints/latest                     text: the newest folder's name
    RUN_DIR/checkpoints/best                       the same of the best one (checkpoint.metric_for_best_model)
    RUN_DIR/checkpoints/step_00000200/model/       float32 weights under transformers' names, experts stacked; buffers
                                      optimizer/   exp_avg.NAME and exp_avg_sq.NAME of the weights that train,
                                                   or momentum_buffer.NAME of those that Muon trains
                                      tokenizer/   what moe.data.tokenizer.load_saved reads
                                      state.json   TrainState
                                      config.yaml  the run's configuration
                                      manifest.json  size and SHA-256 of every file above

A folder that holds a model only has no `optimizer/`, and its weights have the model's dtype. Earlier versions wrote the
tokenizer to RUN_DIR/tokenizer.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from moe.engine.base import MOMENTS

CHECKPOINTS = "checkpoints"
LATEST = "latest"
BEST = "best"
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
    return OPTIMIZER if kind in MOMENTS else MODEL


def key_in_file(kind: str, name: str) -> str:
    return f"{kind}.{name}" if kind in MOMENTS else name


def committed(folder: Path) -> list[Path]:
    """Whole checkpoints, newest first. Raises OSError when the folder is there but can't be read: it may be full."""
    try:
        found = [entry.name for entry in os.scandir(folder) if NAME.fullmatch(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        return []
    return sorted((folder / name for name in found), key=step_of, reverse=True)
