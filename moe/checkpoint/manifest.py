"""A checkpoint's manifest: the files that belong to it, with size and SHA-256. No other file of the folder is read."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePosixPath
from typing import Any

from moe.checkpoint.layout import CONFIG, MANIFEST, MODEL, PARTS, STATE
from moe.untrusted import is_count, open_regular, read_json

SHARD = ".safetensors"


def sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """{name in the checkpoint: {"bytes", "sha256"}}. Raises OSError, and ValueError that says what is wrong with it."""
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict):
        raise ValueError("it is not a JSON object")
    for name, one in manifest.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name or "\0" in name:
            raise ValueError(f"{name!r} is no file inside the checkpoint")
        if not isinstance(one, dict) or not is_count(one.get("bytes"), 2**63 - 1):
            raise ValueError(f"{name} has no number of bytes")
        if not isinstance(one.get("sha256"), str) or not re.fullmatch(r"[0-9a-f]{64}", one["sha256"]):
            raise ValueError(f"{name} has no SHA-256")
    missing = {STATE, CONFIG} - manifest.keys()
    if missing:
        raise ValueError(f"it doesn't list {' and '.join(sorted(missing))}")
    if not shards_of(manifest, MODEL):
        raise ValueError(f"it lists no file of {MODEL}/")
    return manifest


def shards_of(manifest: dict[str, Any], part: str) -> list[str]:
    """Names of the safetensors files in the folder `part`, in order."""
    return sorted(name for name in manifest if name.startswith(f"{part}/") and name.endswith(SHARD))


def lists_any(folder: Path, part: str) -> bool:
    """Whether the checkpoint has files in the folder `part`. Raises OSError, ValueError."""
    return any(name.startswith(f"{part}/") for name in read_manifest(folder))


def strays(folder: Path) -> list[Path]:
    """Safetensors files that lie in the checkpoint without being part of it. Raises OSError, ValueError."""
    manifest = read_manifest(folder)
    there = [path for part in PARTS for path in sorted((folder / part).glob(f"*{SHARD}"))]
    return [path for path in there if path.relative_to(folder).as_posix() not in manifest]


def verify(folder: Path, part: int = 0, parts: int = 1, *, without: str | None = None) -> str | None:
    """None if the manifest's files are there with their size and SHA-256, else what is wrong.

    Of several callers each takes every `parts`-th file, beginning with number `part`. Files of the folder `without`
    are left out.
    """
    try:
        for name, expected in sorted(read_manifest(folder).items())[part::parts]:
            if without is not None and name.startswith(f"{without}/"):
                continue
            path = folder / name
            if not path.is_file():
                return f"{name} of {MANIFEST} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {MANIFEST} says {expected['bytes']}"
            if sha256(path) != expected["sha256"]:
                return f"{name} does not match its SHA-256 in {MANIFEST}"
    except (OSError, ValueError, RecursionError) as error:
        return f"{MANIFEST} can't be read ({error})"
    return None
