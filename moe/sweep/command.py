"""`moe train` as another process starts it."""

from __future__ import annotations

import os
import sys

from moe.config.presets import added_dirs
from moe.distributed.parent import DIE_WITH

OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def train_command(overrides: list[str]) -> list[str]:
    """`moe train` in this Python, with this command's folders of presets."""
    folders = [part for folder in added_dirs() for part in ("--config-dir", str(folder))]
    return [sys.executable, "-m", "moe", *folders, "train", *overrides]


def train_environment() -> dict[str, str]:
    """This process's environment without what torchrun says about it: the other process is a run of one rank. It is
    killed by the kernel when this process dies."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in OF_TORCHRUN and not key.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_"))
    }
    return inherited | {DIE_WITH: str(os.getpid())}
