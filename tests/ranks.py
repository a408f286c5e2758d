"""Real ranks for tests: forked processes that communicate over gloo, all under one hard timeout."""

from __future__ import annotations

import gc
import importlib
import io
import multiprocessing
import os
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

LIBRARIES = (
    "torch._dynamo", "torch.distributed.checkpoint", "deepspeed", "deepspeed.moe.layer",
    "deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.bf16_optimizer", "setuptools", "numpy.ctypeslib",
    "safetensors.torch",
)  # fmt: skip

_held: deque[socket.socket] = deque(maxlen=16)  # one that falls out is closed: its run has long had its port


def free_port() -> int:
    """A port for a server on this machine. It is kept from other processes until 16 more have been asked for: bound but
    without a listener, a port is left out where a free one is looked for, and only a server that asks for it by number
    and sets SO_REUSEADDR, as TCPStore does, gets it."""
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("127.0.0.1", 0))
    _held.append(probe)
    return probe.getsockname()[1]


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """Runs `function(*arguments)` in `world_size` forked ranks with torchrun's environment; returns results by rank.

    When a rank raises, the others are killed and its traceback is raised as AssertionError; so is a timeout (seconds).
    """
    processes, queue = _start(world_size, function, arguments)
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(results) < world_size:
            assert time.monotonic() < deadline, f"ranks {set(range(world_size)) - set(results)} hung for {timeout} s"
            if queue.empty():
                dead = [p for i, p in enumerate(processes) if i not in results and p.exitcode not in (None, 0)]
                assert not dead or not queue.empty(), f"a rank died with exit code {dead[0].exitcode}"
                time.sleep(0.02)
                continue
            rank, failed, value = queue.get()
            assert not failed, f"rank {rank}:\n{value}"
            results[rank] = torch.load(io.BytesIO(value), weights_only=False)
    finally:
        for process in processes:
            if process.is_alive() and len(results) < world_size:
                process.kill()
            process.join(10)
    return [results[rank] for rank in range(world_size)]


def run_until_dead(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[int]:
    """Like `run_ranks`, for ranks that are expected to die: returns the exit codes by rank, −N for signal N.

    Raises AssertionError if a rank is still alive after `timeout` seconds.
    """
    processes, queue = _start(world_size, function, arguments)
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        while not queue.empty():
            queue.get()  # a rank can't exit before its result is read
        time.sleep(0.02)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join(10)
    assert not hung, f"ranks {hung} were still alive after {timeout} s"
    return [process.exitcode or 0 for process in processes]


def _start(world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[list[Any], Any]:
    torch.set_num_threads(1)  # NOTE: without this a fork after multi-threaded torch operations hangs
    for module in LIBRARIES:  # once, not in every rank
        importlib.import_module(module)
    importlib.import_module("moe.engine.deepspeed.lean_imports").import_muon_uncompiled()
    context = multiprocessing.get_context("fork")
    port, queue = free_port(), context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, queue, function, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes, queue


def _rank(rank: int, world_size: int, port: int, queue: Any, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    # The parent's objects are never freed here, so collections, a dozen during DeepSpeed's start, needn't visit them.
    gc.freeze()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        buffer = io.BytesIO()
        torch.save(function(*arguments), buffer)  # as bytes: a tensor in a queue is lost when its sender exits
        queue.put((rank, False, buffer.getvalue()))
    except BaseException:
        queue.put((rank, True, traceback.format_exc()))
    queue.close()
    queue.join_thread()
