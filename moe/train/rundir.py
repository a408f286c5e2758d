"""A run's directory: one job at a time, and one model for its whole life."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from moe.compose import read_config
from moe.config import Config

# What a checkpoint's tensors and token ids depend on: another value can't continue the run.
FIXED = ("model", "router.num_experts", "tokenizer")
NOT_FIXED = ("model.attention", "model.recompute")  # the same function, computed in another way


def lock(run_dir: Path) -> IO[str]:
    """Hold the directory until the returned file closes. Raises ValueError if another job holds it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise ValueError(
            f"run_dir={run_dir} is in use by {holder}: wait for it, stop it, or choose another run_dir"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    return file


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """A configuration as {dotted key: leaf}."""
    names = getattr(value, "__dataclass_fields__", None)
    items = [(name, getattr(value, name)) for name in names] if names else None
    if items is None and isinstance(value, dict):
        items = list(value.items())
    if items is None:
        return {prefix: getattr(value, "name", value)}
    flat: dict[str, object] = {}
    for name, item in items:
        flat |= flatten(item, f"{prefix}.{name}" if prefix else str(name))
    return flat


def differences(old: Config, new: Config) -> dict[str, tuple[object, object]]:
    """{key: (old value, new value)} where they differ."""
    before, after = flatten(old), flatten(new)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def check_resumable(checkpoint: Path, config: Config) -> list[str]:
    """Lines that tell what changed since `checkpoint`. Raises ValueError for what can't change."""
    changed = differences(read_config(checkpoint / "config.yaml"), config)
    lines = []
    for key, (old, new) in changed.items():
        fixed = any(key == one or key.startswith(f"{one}.") for one in FIXED) and key not in NOT_FIXED
        if fixed:
            raise ValueError(
                f"{key}={new}, but the checkpoint {checkpoint} was written with {key}={old}: "
                "set it back, or start another run with run_dir=…"
            )
        lines.append(f"{key}: {old} → {new}")
    return lines
