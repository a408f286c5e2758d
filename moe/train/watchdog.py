"""Ends a run that hangs, and says who hung and where every rank stood, so that the launcher can start it again.

The training thread says what it does (`beat`). On every rank one thread posts that to the ranks' store, over a
connection of its own, and another looks at it. When it is older than `guard.hang_seconds`:

1. the rank raises the alarm in the store, which every living rank sees with its next post;
2. each of them reads all posts twice, a few posts apart: a post that stays the same is a rank that is stopped, or whose
   machine is gone; the others are alive, and the one furthest behind is where to look;
3. each writes what it found and the stacks of all its threads to stderr, says so in the store, and waits until all
   living ranks have: once one process has left, torchrun ends the rest;
4. each kills the stopped ranks of its own machine (torchrun would wait 30 s for them) and leaves with EXIT_CODE.

A thread that holds the interpreter's lock stops the watchdog's threads too: then the other ranks see a stopped rank,
and after four times `guard.hang_seconds` a timer outside the interpreter writes the stacks and ends it (code 1).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from torch.distributed import DistError

from moe.distributed.mesh import Mesh
from moe.distributed.rendezvous import own_store

EXIT_CODE = 75  # sysexits.h: EX_TEMPFAIL, try again
POSTS = 10  # in guard.hang_seconds
LONGEST_POST_INTERVAL = 5.0  # seconds
SILENT_POSTS = 3  # so many missing posts make a stopped rank
LONG = 2.0  # × guard.hang_seconds for what takes longer than a micro-batch: the first step (kernels), a checkpoint
SHOWN_RANKS = 8


class Watchdog:
    """`with Watchdog(…) as watchdog:` around the training loop. `seconds` null: `beat` does nothing."""

    def __init__(self, mesh: Mesh, seconds: float | None) -> None:
        self._mesh, self._seconds = mesh, seconds
        self._interval = min(LONGEST_POST_INTERVAL, (seconds or 0.0) / POSTS)
        self._store = own_store(max(10.0, 2 * self._interval)) if seconds is not None else None
        self._store_error = ""
        self._left = threading.Event()
        self._alarm = threading.Event()  # a rank, perhaps another one, hangs
        self._posts = 0
        self._threads: list[threading.Thread] = []
        self._first_step: int | None = None
        self._beat = (time.monotonic(), LONG, "the start")

    def beat(self, step: int, doing: str, *, long: bool = False) -> None:
        """The training thread now begins with `doing`; `long`: that may take twice `guard.hang_seconds`."""
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
        self._left.set()
        for thread in self._threads:
            thread.join(self._interval + 1)  # not longer: one may be waiting for a store that is gone
        faulthandler.cancel_dump_traceback_later()

    # The two threads

    def _post(self) -> None:
        assert self._store is not None
        identity = {"host": os.uname().nodename, "pid": os.getpid(), "started": _started(os.getpid())}
        while True:
            since, _, doing = self._beat
            self._posts += 1
            post = {"number": self._posts, "at": time.strftime("%H:%M:%S"), "idle": time.monotonic() - since}
            post |= identity | {"doing": doing, "left": self._left.is_set()}
            try:
                self._store.set(f"post/{self._mesh.rank}", json.dumps(post))
                if self._store.check(["alarm"]):
                    self._alarm.set()
            except DistError as error:
                self._store_error = " ".join(str(error).split())
                return  # told when this rank stalls: at the end of a run the store may leave before this rank
            if post["left"]:
                return
            self._left.wait(self._interval)

    def _watch(self) -> None:
        assert self._seconds is not None
        looked = time.monotonic()
        while not self._left.wait(0 if self._alarm.is_set() else self._interval / 2):
            now = time.monotonic()
            since, times, doing = self._beat
            if now - looked > SILENT_POSTS * self._interval:  # this process was stopped itself (Ctrl-Z): begin anew
                self._beat = (now, times, doing)
            elif now - since > times * self._seconds or self._alarm.is_set():
                try:
                    self._end(now - since, doing)
                finally:
                    os._exit(EXIT_CODE)
            looked = now
            faulthandler.dump_traceback_later(2 * LONG * self._seconds, exit=True, file=2)

    # The end

    def _end(self, idle: float, doing: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        mine = f"rank {self._mesh.rank} of {self._mesh.world_size}"
        lines = [f"{mine}: no progress for {idle:.1f} s, in {doing} (guard.hang_seconds={self._seconds:g})"]
        posts: dict[int, dict[str, Any]] = {}
        silent: set[int] = set()
        if self._store is not None:
            seen: list[dict[int, dict[str, Any]]] = []
            reader = threading.Thread(target=self._read_twice, args=(seen,), daemon=True)
            reader.start()
            reader.join(SILENT_POSTS * self._interval + 15)
            if len(seen) == 2:
                posts = seen[1]
                silent = {rank for rank in posts if posts[rank] == seen[0].get(rank) and not posts[rank]["left"]}
                lines += _findings(posts, silent, self._mesh.rank)
            else:
                why = self._store_error or "it does not answer"
                lines.append(f"the ranks' store is gone, and with it rank 0's torchrun or machine ({why})")
        lines += ["stacks of all threads:", *_stacks()]
        os.write(2, "".join(f"[{mine}] {line}\n" for line in lines).encode())
        if posts:
            waiter = threading.Thread(
                target=self._wait_for_dumps,
                args=({rank for rank in posts.keys() - silent if not posts[rank]["left"]},),
                daemon=True,
            )
            waiter.start()
            waiter.join(SILENT_POSTS * self._interval + 5)
        for rank in silent:
            _kill(posts[rank])
        sys.stdout.flush()

    def _read_twice(self, seen: list[dict[int, dict[str, Any]]]) -> None:
        assert self._store is not None
        try:
            self._store.set("alarm", str(self._mesh.rank))
            for again in (True, False):
                ranks = [rank for rank in range(self._mesh.world_size) if self._store.check([f"post/{rank}"])]
                raw = self._store.multi_get([f"post/{rank}" for rank in ranks])
                seen.append({rank: json.loads(text) for rank, text in zip(ranks, raw, strict=True)})
                if again:
                    time.sleep(SILENT_POSTS * self._interval)
        except DistError as error:
            self._store_error = " ".join(str(error).split())

    def _wait_for_dumps(self, living: set[int]) -> None:
        assert self._store is not None
        try:
            self._store.set(f"dumped/{self._mesh.rank}", "")
            while not self._store.check([f"dumped/{rank}" for rank in living]):
                time.sleep(self._interval / 2)
        except DistError as error:
            os.write(2, f"the ranks' store is gone: {error}\n".encode())


def _findings(posts: dict[int, dict[str, Any]], silent: set[int], own: int) -> list[str]:
    """One line for each rank that is stopped; if there is none, for the one that is furthest behind."""
    found = [
        f"rank {rank} is stopped or its machine is gone: {_who(posts[rank])}, last heard at {posts[rank]['at']}, in "
        f"{posts[rank]['doing']}"
        for rank in sorted(silent)
    ]
    more = len(found) - SHOWN_RANKS
    found = [*found[:SHOWN_RANKS], f"and {more} more ranks"] if more > 0 else found
    if not found:
        rank = max(posts, key=lambda rank: posts[rank]["idle"])
        post = posts[rank]
        state = "has left the loop" if post["left"] else "is alive but behind" + (" (this one)" if rank == own else "")
        found = [f"no rank is stopped; rank {rank} {state}: {_who(post)}, for {post['idle']:.1f} s in {post['doing']}"]
    return found


def _who(post: dict[str, Any]) -> str:
    return f"process {post['pid']} on {post['host']}"


def _stacks() -> list[str]:
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().splitlines()


def _started(pid: int) -> int | None:
    """When the process started, in clock ticks since the machine did (proc(5), field 22); None if it isn't there."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    except OSError:
        return None


def _kill(post: dict[str, Any]) -> None:
    """SIGKILL to a stopped rank, if it is on this machine; its start tells it from another process of that number."""
    if post["host"] == os.uname().nodename and post["started"] is not None and _started(post["pid"]) == post["started"]:
        with contextlib.suppress(ProcessLookupError):  # another rank was faster
            os.kill(post["pid"], signal.SIGKILL)
