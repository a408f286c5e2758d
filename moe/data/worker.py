"""`python -m moe.data.worker DESCRIPTOR`: a process that works on parts of sources for the one that prepares.

It is started anew, not forked: a fork of a process with threads, as torch's and gloo's, may hang. It gets messages
through the socket DESCRIPTOR, answers each item with a result or an error, and ends when the socket is closed: when its
work is done, and also when the process that prepares was killed.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from moe.data.readers import DataError


class WorkerFault(RuntimeError):
    """A fault of the program in another process, with its traceback."""


def main() -> None:
    serve(Connection(int(sys.argv[1])))
    os._exit(0)  # nothing is left to do, and nobody is there to be told


def serve(connection: Connection) -> None:
    """Answers each item that comes until the other end closes."""
    job: Callable[[Any], Any] | None = None
    try:
        while True:
            is_job, message = connection.recv()
            if is_job:
                job = message
                continue
            assert job is not None
            connection.send(_done(job, message))
    except (EOFError, OSError):  # of the connection: `_done` returns the errors of a job
        return


def _done(job: Callable[[Any], Any], item: Any) -> tuple[Any, list[BaseException]]:
    """The result, or None and the error with its causes."""
    try:
        return job(item), []
    except (DataError, OSError) as error:
        return None, chain_of(error)
    except Exception:
        return None, [WorkerFault(traceback.format_exc())]


def chain_of(error: BaseException) -> list[BaseException]:
    """An error and its causes: sent to another process, each would lose its own."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__module__ == "builtins" or isinstance(cause, DataError):  # others may not be sendable
            chain.append(cause)
        cause = cause.__cause__
    return chain


if __name__ == "__main__":
    from moe.data import worker  # under its own name, by which its classes are found in the other process

    worker.main()
