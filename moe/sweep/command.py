"""`moe train` as another process starts it."""

from __future__ import annotations

import sys

from moe.config.presets import added_dirs


def train_command(overrides: list[str]) -> list[str]:
    """`moe train` in this Python, with this command's folders of presets."""
    folders = [part for folder in added_dirs() for part in ("--config-dir", str(folder))]
    return [sys.executable, "-m", "moe", *folders, "train", *overrides]
