"""How this process joins the others. Started by torchrun or as one plain process."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout

from moe.cores import usable_cores
from moe.distributed.environment import whole_number, world_from_environment
from moe.distributed.meeting import meet, start_timeout
from moe.distributed.mesh import Mesh
from moe.errors import StartError

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
MAX_THREADS = 1024
RUNNING_GLOO = rb"\(pt_gloo_runloop\) [^S]"  # in /proc/…/stat: a thread of gloo that isn't asleep
LONGEST_RELEASE = 5.0  # seconds that a thread of gloo may need on a busy machine to free what it holds


def start(expert_parallel_size: int, config: Mapping[str, object] | None = None) -> Mesh:
    """Meet the other ranks, join the process group, choose the device and the number of threads.

    `config` is the run's flat configuration ({dotted key: value}), the same on every rank. Raises StartError, one line
    that names the ranks that never came or the keys that differ.
    """
    rank, world_size, local_rank, local_world_size = world_from_environment()
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise StartError(
                f"{local_world_size} processes on this machine but {gpus} GPU{'s' * (gpus > 1)}: "
                f"NPROC (torchrun --nproc-per-node) must be ≤ {gpus}",
                prints=local_rank == gpus,
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(_threads(local_world_size))
    if not dist.is_initialized():
        backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
        if world_size > 1:
            _join(backend, rank, world_size, config or {})
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return Mesh(rank, world_size, local_rank, local_world_size, expert_parallel_size, device)


def _threads(local_world_size: int) -> int:
    """What OMP_NUM_THREADS says, else this process's share of the cores it may use.

    With several ranks, 1 says nothing: torchrun sets the variable to 1 where the user has not set it.
    """
    stated = os.environ.get("OMP_NUM_THREADS", "")
    if stated and (local_world_size == 1 or stated != "1"):
        first = re.fullmatch(r"([0-9]{1,9})(,[0-9]+)*", stated)  # OpenMP allows one number for each nesting level
        if first is None or not 1 <= int(first[1]) <= MAX_THREADS:
            raise StartError(f"OMP_NUM_THREADS={stated} must be a whole number from 1 to {MAX_THREADS}", prints=True)
        return int(first[1])
    return max(1, usable_cores() // local_world_size)


def _join(backend: str, rank: int, world_size: int, config: Mapping[str, object]) -> None:
    timeout = start_timeout()
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        raise StartError(
            f"WORLD_SIZE={world_size} but MASTER_ADDR={address or ''} and MASTER_PORT={port or ''}: "
            "start with torchrun (launch/torchrun.sh), or set both",
            prints=True,
        )
    whole_number("MASTER_PORT", 0, 1, 65535)
    # Under torchrun the agent owns the store and every rank is its client.
    owns = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store: Store = TCPStore(
            address, int(port), is_master=owns, timeout=timedelta(seconds=timeout), wait_for_workers=False
        )
    except (dist.DistError, OSError) as error:
        verb, hint = ("open", "is the port taken?") if owns else ("reach", f"is rank 0 of {world_size} running there?")
        raise StartError(
            f"rank {rank} could not {verb} MASTER_ADDR={address} MASTER_PORT={port} within {timeout:g} s: {hint}",
            prints=True,
        ) from error
    session = meet(store, rank, world_size, config, timeout, owns_store=owns)
    # gloo would read a dead attempt's addresses from torchrun's store: each session has keys of its own.
    store = PrefixStore(session, store)
    store.set_timeout(COLLECTIVE_TIMEOUT)
    try:
        # All ranks are here, so connecting takes moments, or never succeeds; and gloo waits five times as long as told.
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout / 5)
        )
    except RuntimeError as error:
        raise StartError(
            f"rank {rank} could not connect to the other ranks ({' '.join(str(error).split())}): on several nodes set "
            "GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the network between them, as `ip -brief address` names it",
            prints=True,
        ) from error
    _set_pg_timeout(COLLECTIVE_TIMEOUT)


def own_store(seconds: float) -> Store | None:
    """A new connection to the ranks' store, for a thread that must not wait behind a collective; None without ranks.

    Its calls raise DistError after `seconds`.
    """
    if dist.get_world_size() == 1:
        return None
    store: Any = PrefixStore("watchdog", _get_default_store())
    store = store.clone()  # torch's stubs don't know it
    store.set_timeout(timedelta(seconds=seconds))
    return store


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        _wait_for_gloo()


def _wait_for_gloo() -> None:
    """Waits until gloo's threads are idle, at most `LONGEST_RELEASE` seconds; not for a collective that hangs.

    Each holds a collective's tensors for a moment after the collective is done. A thread that frees them while Python
    shuts down aborts the process (exit code −6). Threads outlive `destroy_process_group` where something, such as the
    engine, still holds their group.
    """
    until, idle = time.monotonic() + LONGEST_RELEASE, 0
    while idle < 2 and time.monotonic() < until:  # a thread that waits for Python's lock (GIL) looks idle too, but once
        time.sleep(0.001)  # without the lock
        idle = 0 if any(re.search(RUNNING_GLOO, line) for line in _threads_of_this_process()) else idle + 1


def _threads_of_this_process() -> Iterator[bytes]:
    """Each thread's "ID (name) state …" (proc_pid_stat(5)); nothing where /proc can't be read."""
    with suppress(OSError):  # among others: no file descriptor left
        for path in Path("/proc/self/task").glob("*/stat"):
            with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
                yield path.read_bytes()
