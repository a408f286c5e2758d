"""What a script cost: its wall-clock and its CPU time."""

from __future__ import annotations

import re
from pathlib import Path

from data.examples.page import Bar, elapsed


def cpu_seconds(folder: Path) -> float | None:
    """Of all commands of the script, from what bash's `times` wrote into FOLDER/times; None without it."""
    path = folder / "times"
    found = re.findall(r"(\d+)m([\d.]+)s", path.read_text().splitlines()[-1]) if path.exists() else []
    return sum(60 * int(minutes) + float(seconds) for minutes, seconds in found) or None


def time_bars(folder: Path, minutes: int) -> list[Bar]:
    """A limit for 2 cores. It is met, too, where the CPU time is within it: one core alone, doing nothing else, would
    have taken no longer. Empty where FOLDER doesn't say when the script began."""
    wall, cpu = elapsed(folder), cpu_seconds(folder)
    if wall is None:
        return []
    reached = f"{wall / 60:.1f} minutes" + (f", of which {cpu / 60:.1f} CPU minutes" if cpu is not None else "")
    least = wall if cpu is None else min(wall, cpu)
    return [Bar("time", f"≤ {minutes} minutes on 2 cores", reached, least <= 60 * minutes)]
