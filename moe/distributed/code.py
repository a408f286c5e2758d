"""What a rank runs: versions, and a digest of this package's source. All ranks must run the same."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

PREFIX = "code."  # of the keys, beside those of the configuration
PACKAGE = Path(__file__).resolve().parents[1]


def running_code() -> dict[str, str]:
    """{key: value} of this process."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {
        f"{PREFIX}python": python,
        f"{PREFIX}torch": version("torch"),
        f"{PREFIX}deepspeed": version("deepspeed"),
        f"{PREFIX}moe": source_digest(PACKAGE),
    }


def source_digest(package: Path) -> str:
    """12 hexadecimal digits of the SHA-256 of every Python file's name and content."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:12]
