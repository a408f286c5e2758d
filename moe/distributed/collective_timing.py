"""How long this rank waits for the others in a step. Ranks wait for one another in every collective, so all their steps
take equally long; which one is slow shows in the time that a rank does *not* wait.

Every collective of every library ends in a method of torch's `ProcessGroup` and, if it waits, in `Work.wait`: those
are timed here, by what they cost the thread on a CPU and by pairs of events on the current stream on CUDA, where a
collective's call returns at once and it is the stream that waits. (The CUDA side has not run on a GPU yet.)
Background threads, which have groups and collectives of their own, are not counted.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, Work

from moe.distributed.mesh import Mesh

COLLECTIVES = (  # of all supported versions of torch, which renamed some
    "_allgather_base", "_reduce_scatter_base", "all_gather_single", "all_to_all_single", "allgather",
    "allgather_coalesced", "allgather_into_tensor_coalesced", "allreduce", "allreduce_coalesced", "alltoall",
    "alltoall_base", "barrier", "broadcast", "gather", "monitored_barrier", "recv", "recv_anysource", "reduce",
    "reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor_coalesced", "scatter",
)  # fmt: skip


class CollectiveTiming:
    """Times this process's collectives until `remove`, if `enabled` (`guard.name_stragglers`): nothing of torch is
    changed otherwise, and `busy_seconds` stays 0.

    A step is what lies between `begin` and `end`; `busy_seconds` is the last whole step's time without its waiting
    (0.0 before there is one). On CUDA call `end` where the host has waited for the step's results anyway.
    """

    def __init__(self, mesh: Mesh, *, enabled: bool) -> None:
        self._cuda = mesh.device.type == "cuda"
        self._real: list[tuple[type, str, Any]] = []
        self._inside = False
        self._waited = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._began = 0.0
        self.busy_seconds = 0.0
        if mesh.world_size == 1 or not enabled:
            return
        for kind, names in ((ProcessGroup, COLLECTIVES), (Work, ("wait",))):
            for name in names:
                # NOTE: the class's own attribute: `getattr` gives a bare function, which would not bind when restored.
                held = vars(kind).get(name)
                if held is not None:
                    self._real.append((kind, name, held))
                    setattr(kind, name, self._timed(getattr(kind, name)))

    def remove(self) -> None:
        while self._real:
            setattr(*self._real.pop())

    def begin(self) -> None:
        self._waited, self._events = 0.0, []
        self._began = time.perf_counter()

    def end(self) -> float:
        """The step's seconds, waiting included."""
        seconds = time.perf_counter() - self._began
        for start, stop in self._events:
            stop.synchronize()
            self._waited += start.elapsed_time(stop) / 1000
        self.busy_seconds = max(0.0, seconds - self._waited) if self._real else 0.0
        return seconds

    def _timed(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            if self._inside or _in_background():
                return real(*arguments, **keywords)
            self._inside = True
            try:
                return (self._on_stream if self._cuda else self._here)(real, arguments, keywords)
            finally:
                self._inside = False

        return timed

    def _here(self, real: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        started = time.perf_counter()
        try:
            return real(*arguments, **keywords)
        finally:
            self._waited += time.perf_counter() - started

    def _on_stream(self, real: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = real(*arguments, **keywords)
        stop.record()
        self._events.append((start, stop))
        return result


def _in_background() -> bool:
    """In a thread that Python started. CUDA's backward pass runs in one of torch's own, which counts."""
    thread = threading.current_thread()
    return thread is not threading.main_thread() and not isinstance(thread, threading._DummyThread)


def host_names(world_size: int) -> list[str]:
    """Each rank's machine. A collective."""
    names = [socket.gethostname()] * world_size
    if world_size > 1:
        dist.all_gather_object(names, names[0])
    return names
