"""The clock of comparisons on a CPU."""

from __future__ import annotations

import time

import torch


def now() -> float:
    """Seconds: with one thread CPU time, which other programs on the machine disturb less than wall-clock."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def clock() -> str:
    """What `now` is."""
    return "CPU time" if torch.get_num_threads() == 1 else "wall-clock"
