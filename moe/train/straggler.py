"""Finds the rank that the others wait for.

All ranks' steps take equally long, as they wait for one another; a straggler is the rank that waits least. The busy
seconds of every rank (`moe.distributed.collective_timing`) are gathered with each step's metrics, and their medians
over a window of steps are compared: a rank that is busy for much longer than the median of the others is named.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

WINDOW = 10  # steps
SHARE = 0.2  # of a step: the excess from which a rank is a straggler
SMALLEST = 0.03  # seconds: less is a small model on a busy machine
STEADY = 8  # of WINDOW: in so many steps it must have been that slow
AGAIN = 1000  # steps after which the same rank is named again


class Straggler:
    """Is given every step's busy seconds by rank; warns of the rank that holds the others up.

    `hosts` are the machines' names by rank. With one rank there is nothing to compare.
    """

    def __init__(self, hosts: Sequence[str], warn: Callable[[str], None]) -> None:
        self._hosts, self._warn = hosts, warn
        self._busy: deque[list[float]] = deque(maxlen=WINDOW)
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._named: tuple[int, int] | None = None  # rank, at which step

    def __call__(self, step: int, seconds: float, busy: list[float]) -> dict[str, Any]:
        """Metrics: the busiest rank over the window, and its excess in seconds.

        `seconds` is the step's duration, `busy` every rank's time without waiting (zeros before it is measured).
        """
        if len(busy) > 1 and all(busy):
            self._busy.append(busy)
            self._seconds.append(seconds)
        if len(self._busy) < WINDOW:
            return {"slowest_rank": None, "straggler_seconds": None}
        by_rank = [statistics.median(rank) for rank in zip(*self._busy, strict=True)]
        slowest = max(range(len(by_rank)), key=by_rank.__getitem__)
        others = _others(by_rank, slowest)
        excess = by_rank[slowest] - others
        limit = max(SMALLEST, SHARE * statistics.median(self._seconds))
        steady = sum(ranks[slowest] - _others(ranks, slowest) > limit for ranks in self._busy)
        if excess > limit and steady >= STEADY and self._is_news(slowest, step):
            self._named = slowest, step
            self._warn(
                f"step {step}: rank {slowest} on {self._hosts[slowest]} is slow: it computes {by_rank[slowest]:.3g} s "
                f"a step, the other ranks {others:.3g} s (medians of {WINDOW} steps), and they wait for it; look at "
                "its data loading, its GPU or cores, and other jobs on that machine"
            )
        return {"slowest_rank": slowest, "straggler_seconds": excess}

    def _is_news(self, rank: int, step: int) -> bool:
        return self._named is None or self._named[0] != rank or step - self._named[1] >= AGAIN


def _others(by_rank: list[float], rank: int) -> float:
    return statistics.median(by_rank[:rank] + by_rank[rank + 1 :])
