"""Work on the parts of a source in several processes, with the results in the order of the parts.

A process gets its next part when it is done with the one before. Results that come before their turn wait here, at most
`AHEAD` for each process: memory doesn't grow with the source. A part's error is raised when its turn comes, so the
first bad part is the one that is named, however many processes there are.

The processes are started here, or they are ranks of torchrun, on any nodes, which connected before
(`moe.distributed.sockets`) and see the same files.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

from moe.config.data import MOST_PROCESSES
from moe.cores import usable_cpus
from moe.data.readers import DataError

AHEAD = 3  # parts in work or waiting for their turn, for each process
BYTES_EACH = 16 << 20  # of files, for which one more process is worth its start

T = TypeVar("T")
R = TypeVar("R")


def chosen_processes(stated: int | None, file_bytes: int) -> int:
    """`data.processes`, or as many as there are CPUs and enough text for."""
    return max(1, min(usable_cpus(), file_bytes // BYTES_EACH, MOST_PROCESSES)) if stated is None else stated


@dataclass(slots=True)
class _Worker:
    """`process` is None for a rank, which has a `name`."""

    process: subprocess.Popen[bytes] | None
    connection: Connection
    name: str = ""
    job: Any = None
    number: int | None = None  # of the item in work


class Processes:
    """`count` processes, started when there is work for them; with a count of 1 this process does all of it. Or the
    `ranks` that are connected, (socket, name)."""

    def __init__(self, count: int, ranks: Sequence[tuple[Connection, str]] = ()) -> None:
        self._ranks, self.count = bool(ranks), len(ranks) or count
        self._workers = [_Worker(None, connection, name) for connection, name in ranks]

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(self._workers)

    def run(self, job: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`job(item)` of each item, in order. Both must be picklable if `count` is not 1. Raises what `items` and `job`
        raise, and DataError when a process was killed."""
        here = self.count == 1 and not self._ranks
        return map(job, items) if here else self._run(job, iter(items))

    def _run(self, job: Callable[[T], R], items: Iterator[T]) -> Iterator[R]:
        message = pickle.dumps((True, job), pickle.HIGHEST_PROTOCOL)
        planned: deque[tuple[int, T]] = deque()
        done: dict[int, tuple[Any, list[BaseException]]] = {}
        taken = given = 0  # items taken from `items`, results given back
        more = True
        try:
            while more or given < taken:
                self._receive(done, block=False)
                while planned and (worker := self._idle()):
                    self._send(worker, message, job, *planned.popleft())
                if given in done:
                    result, errors = done.pop(given)
                    if errors:
                        raise _linked(errors)
                    given += 1
                    yield result
                elif more and len(planned) < self.count and taken - given < AHEAD * self.count:
                    try:
                        planned.append((taken, next(items)))
                    except StopIteration:
                        more = False
                        continue
                    except Exception as error:
                        done[taken] = (None, [error])
                        more = False
                    taken += 1
                else:
                    self._receive(done, block=True)
        finally:  # after an error, or where nobody asks for the other results
            busy = [worker for worker in self._workers if worker.number is not None]
            self._end([worker for worker in busy if worker.process is not None])
            for worker in busy:
                if worker.process is None:  # it stays for other work: the result that nobody asks for is dropped
                    with suppress(EOFError, OSError):
                        worker.connection.recv()
                    worker.number = None

    def _idle(self) -> _Worker | None:
        idle = next((worker for worker in self._workers if worker.number is None), None)
        if idle is None and not self._ranks and len(self._workers) < self.count:
            idle = self._started()
        return idle

    def _started(self) -> _Worker:
        ours, theirs = Pipe()
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        alone = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(paths)}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "moe.data.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | alone,
                process_group=0,  # a terminal's Ctrl-C reaches this process alone, which ends the others
            )
        worker = _Worker(process, cast(Connection, ours))
        self._workers.append(worker)
        return worker

    def _send(self, worker: _Worker, message: bytes, job: Any, number: int, item: Any) -> None:
        try:
            if worker.job is not job:
                worker.connection.send_bytes(message)
            worker.connection.send((False, item))
        except ConnectionError as error:
            raise self._lost(worker) from error
        worker.job, worker.number = job, number

    def _receive(self, done: dict[int, tuple[Any, list[BaseException]]], *, block: bool) -> None:
        """Takes the results that are there; with `block` waits for one."""
        busy = {worker.connection: worker for worker in self._workers if worker.number is not None}
        for connection in wait(list(busy), None if block else 0) if busy else ():
            worker = busy[cast(Connection, connection)]
            assert worker.number is not None
            try:
                done[worker.number] = worker.connection.recv()
            except (EOFError, OSError) as error:  # OSError where it was ended in the middle of a result
                raise self._lost(worker) from error
            worker.number = None

    def _lost(self, worker: _Worker) -> DataError:
        if worker.process is None:
            return DataError(f"{worker.name} ended or is no longer reached: run it again")
        code = worker.process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        memory = " (the kernel does so when memory runs out)" if code == -signal.SIGKILL else ""
        return DataError(
            f"data.processes={self.count}: process {worker.process.pid} {how}{memory}: run it again, or with fewer "
            "processes"
        )

    def _end(self, workers: list[_Worker]) -> None:
        for worker in workers:
            if worker.process is not None:
                worker.process.kill()  # it has nothing to save
            worker.connection.close()  # a rank ends when it sees this
        for worker in workers:
            if worker.process is not None:
                worker.process.wait()
        self._workers = [worker for worker in self._workers if worker not in workers]


def _linked(chain: list[BaseException]) -> BaseException:
    """The first error, with the others as its causes."""
    for error, cause in pairwise(chain):
        error.__cause__ = cause
    return chain[0]
