"""Which CPU this is."""

from __future__ import annotations

import os
from pathlib import Path

UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # they decide the speed of matrix products


def processor() -> tuple[str, list[str]]:
    """The model's name, by /proc/cpuinfo, else the architecture's; and those of `UNITS` that it has."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = known.get("flags", "").split()
    return known.get("model name", os.uname().machine), [unit for unit in UNITS if unit in flags]
