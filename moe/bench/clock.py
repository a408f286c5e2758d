"""The clock of comparisons on a CPU, and what their times depend on."""

from __future__ import annotations

import time

import torch

from moe.bench.settings import counted, load


def now() -> float:
    """Seconds: with one thread CPU time, which other programs on the machine disturb less than wall-clock."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def clock() -> str:
    """What `now` is."""
    return "CPU time" if torch.get_num_threads() == 1 else "wall-clock"


def conditions(read: str | None = None, ranks: int = 1) -> str:
    """`CPU time, 2 ranks of 1 thread, load 0.4`, for notes. `read` names the clock that was read, None: `now`'s."""
    threads = counted(torch.get_num_threads(), "thread")
    return f"{read or clock()}, {f'{ranks} ranks of ' if ranks > 1 else ''}{threads}, {load()}"
