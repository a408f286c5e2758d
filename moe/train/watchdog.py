"""Ends a run that hangs and prints which rank hung and where, so that the launcher can restart the run.

The training thread records what it is doing (`beat`). On every rank one watchdog thread posts that record to the ranks'
store, over a connection of its own, and another checks the record's age. When it is older than `guard.hang_seconds`:

1. the rank sets the key `alarm` in the store, which every live rank reads after its next post;
2. each live rank reads all posts twice, a few posting intervals apart. A rank whose post hasn't changed is stopped, or
   its machine is gone. If all posts have changed, the rank that has made no progress for the longest time is named;
3. each live rank writes these findings and the stacks of all its threads to stderr, records in the store that it has,
   and waits until all live ranks have: as soon as one process ends, torchrun ends the others;
4. each kills the stopped ranks of its own machine (torchrun would wait 30 s for them) and exits with EXIT_CODE.

A thread that holds the interpreter's lock stops the watchdog's threads too. The other ranks then find this rank
stopped, and after four times `guard.hang_seconds` a timer outside the interpreter writes its stacks and ends it (exit
code 1).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from torch.distributed import DistError

from moe.distributed.mesh import Mesh
from moe.distributed.rendezvous import own_store

EXIT_CODE = 75  # sysexits.h: EX_TEMPFAIL, try again
POSTS = 10  # per guard.hang_seconds
LONGEST_POST_INTERVAL = 5.0  # seconds
MISSED_POSTS = 3  # after so many missing posts a rank counts as stopped
LONG = 2.0  # × guard.hang_seconds is the limit for the first step (kernels are compiled) and for checkpoints
SHOWN_RANKS = 8  # at most so many stopped ranks are listed


class Watchdog:
    """Watches the training loop inside its `with` block. `seconds` is guard.hang_seconds; None: nothing is watched."""

    def __init__(self, mesh: Mesh, seconds: float | None) -> None:
        self._mesh, self._seconds = mesh, seconds
        self._interval = min(LONGEST_POST_INTERVAL, (seconds or 0.0) / POSTS)
        self._store = own_store(max(10.0, 2 * self._interval)) if seconds is not None else None
        self._store_error = ""
        self._done = threading.Event()  # the `with` block has ended
        self._alarm = threading.Event()  # some rank hangs: this one or another
        self._posts = 0
        self._threads: list[threading.Thread] = []
        self._first_step: int | None = None
        self._beat = (time.monotonic(), LONG, "the start")

    def beat(self, step: int, doing: str, *, long: bool = False) -> None:
        """Called by the training thread when it begins `doing`; `long`: it may take twice `guard.hang_seconds`."""
        if self._first_step is None:
            self._first_step = step
        times = LONG if long or step == self._first_step else 1.0
        self._beat = (time.monotonic(), times, f"step {step}, {doing}")

    def __enter__(self) -> Watchdog:
        if self._seconds is not None:
            self._beat = (time.monotonic(), LONG, "the start")
            work = [self._watch] if self._store is None else [self._watch, self._post]
            self._threads = [threading.Thread(target=target, name="watchdog", daemon=True) for target in work]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(self._interval + 1)  # with a limit: a thread may be waiting for a store that is gone
        faulthandler.cancel_dump_traceback_later()

    # The two threads

    def _post(self) -> None:
        assert self._store is not None
        identity = {"host": os.uname().nodename, "pid": os.getpid(), "started": _start_time(os.getpid())}
        while True:
            since, _, doing = self._beat
            self._posts += 1
            post = {"number": self._posts, "at": time.strftime("%H:%M:%S"), "idle": time.monotonic() - since}
            post |= identity | {"doing": doing, "done": self._done.is_set()}
            try:
                self._store.set(f"post/{self._mesh.rank}", json.dumps(post))
                if self._store.check(["alarm"]):
                    self._alarm.set()
            except DistError as error:
                self._store_error = " ".join(str(error).split())
                return  # reported only if this rank hangs: at the end of a run the store may close first
            if post["done"]:
                return
            self._done.wait(self._interval)

    def _watch(self) -> None:
        assert self._seconds is not None
        last_check = time.monotonic()
        while not self._done.wait(0 if self._alarm.is_set() else self._interval / 2):
            now = time.monotonic()
            since, times, doing = self._beat
            if now - last_check > MISSED_POSTS * self._interval:  # this whole process was stopped (Ctrl-Z): start over
                self._beat = (now, times, doing)
            elif now - since > times * self._seconds or self._alarm.is_set():
                try:
                    self._report_and_kill(now - since, doing)
                finally:
                    os._exit(EXIT_CODE)
            last_check = now
            faulthandler.dump_traceback_later(2 * LONG * self._seconds, exit=True, file=2)

    # The end of a run that hangs

    def _report_and_kill(self, idle: float, doing: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        this_rank = f"rank {self._mesh.rank} of {self._mesh.world_size}"
        lines = [f"{this_rank}: no progress for {idle:.1f} s, in {doing} (guard.hang_seconds={self._seconds:g})"]
        posts: dict[int, dict[str, Any]] = {}
        stopped: set[int] = set()
        if self._store is not None:
            readings: list[dict[int, dict[str, Any]]] = []
            reader = threading.Thread(target=self._read_twice, args=(readings,), daemon=True)
            reader.start()
            reader.join(MISSED_POSTS * self._interval + 15)
            if len(readings) == 2:
                posts = readings[1]
                stopped = {rank for rank in posts if posts[rank] == readings[0].get(rank) and not posts[rank]["done"]}
                lines += _findings(posts, stopped, self._mesh.rank)
            else:
                why = self._store_error or "it does not answer"
                lines.append(f"the ranks' store is gone: rank 0's torchrun or machine has ended ({why})")
        try:
            lines += ["stacks of all threads:", *_stacks()]
        except OSError as error:
            lines.append(f"stacks can't be shown: {error}")
        os.write(2, "".join(f"[{this_rank}] {line}\n" for line in lines).encode())
        if posts:
            waiter = threading.Thread(
                target=self._wait_for_reports,
                args=({rank for rank in posts.keys() - stopped if not posts[rank]["done"]},),
                daemon=True,
            )
            waiter.start()
            waiter.join(MISSED_POSTS * self._interval + 5)
        for rank in stopped:
            _kill(posts[rank])
        sys.stdout.flush()

    def _read_twice(self, readings: list[dict[int, dict[str, Any]]]) -> None:
        """Sets the alarm, then appends two readings {rank: post}. In a thread: the store may not answer."""
        assert self._store is not None
        try:
            self._store.set("alarm", str(self._mesh.rank))
            for is_first in (True, False):
                ranks = [rank for rank in range(self._mesh.world_size) if self._store.check([f"post/{rank}"])]
                raw = self._store.multi_get([f"post/{rank}" for rank in ranks])
                readings.append({rank: json.loads(text) for rank, text in zip(ranks, raw, strict=True)})
                if is_first:
                    time.sleep(MISSED_POSTS * self._interval)
        except DistError as error:
            self._store_error = " ".join(str(error).split())

    def _wait_for_reports(self, live: set[int]) -> None:
        """Waits until all `live` ranks have written their reports. In a thread: the store may not answer."""
        assert self._store is not None
        try:
            self._store.set(f"dumped/{self._mesh.rank}", "")
            while not self._store.check([f"dumped/{rank}" for rank in live]):
                time.sleep(self._interval / 2)
        except DistError as error:
            os.write(2, f"the ranks' store is gone: {error}\n".encode())


def _findings(posts: dict[int, dict[str, Any]], stopped: set[int], own: int) -> list[str]:
    """A line for each stopped rank; if there is none, for the rank that has made no progress for the longest time."""
    found = [
        f"rank {rank} is stopped or its machine is gone: {_process(posts[rank])}, last post at {posts[rank]['at']}, in "
        f"{posts[rank]['doing']}"
        for rank in sorted(stopped)
    ]
    more = len(found) - SHOWN_RANKS
    found = [*found[:SHOWN_RANKS], f"and {more} more ranks"] if more > 0 else found
    if not found:
        rank = max(posts, key=lambda rank: posts[rank]["idle"])
        post = posts[rank]
        state = "has left the loop" if post["done"] else "is alive but behind" + (" (this one)" if rank == own else "")
        found = [
            f"no rank is stopped; rank {rank} {state}: {_process(post)}, for {post['idle']:.1f} s in {post['doing']}"
        ]
    return found


def _process(post: dict[str, Any]) -> str:
    return f"process {post['pid']} on {post['host']}"


def _stacks() -> list[str]:
    # In memory: there may be no room for a file.
    with open(os.memfd_create("stacks"), "w+", encoding="utf-8", errors="replace") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().splitlines()


def _start_time(pid: int) -> int | None:
    """The process's start in clock ticks since boot (proc(5), field 22); None if there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    except OSError:
        return None


def _kill(post: dict[str, Any]) -> None:
    """SIGKILL to a stopped rank of this machine. Its start time shows that the id isn't another process's by now."""
    if (
        post["host"] == os.uname().nodename
        and post["started"] is not None
        and _start_time(post["pid"]) == post["started"]
    ):
        with contextlib.suppress(ProcessLookupError):  # another rank has killed it already
            os.kill(post["pid"], signal.SIGKILL)
