"""The settings that every stage gets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """`out` is the report's folder; `folder` holds wheels and prepared data ("" for none); `work` is temporary, shared
    by the stages of one report, and removed at its end. `dry_run` means tiny sizes on the CPU."""

    dry_run: bool
    out: Path
    folder: str
    work: str
