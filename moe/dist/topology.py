"""Who we are among the ranks, and agreement between them. Started by torchrun or as one plain process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from moe.errors import for_user

T = TypeVar("T")
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class Topology:
    """This process among `world_size`; `expert` consecutive ranks share one set of experts."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    expert: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def expert_rank(self) -> int:
        """Which slice of the experts this rank holds."""
        return self.rank % self.expert

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """In-place sum over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def agree(self, action: Callable[[], T], what: str) -> T:
        """Run `action` on every rank; if it failed on any, every rank raises the first failure's one line.

        Without this, a rank that alone meets a bad file would leave the others waiting in the next collective.
        Raises ValueError.
        """
        result: T | None = None
        failure: str | None = None
        cause: Exception | None = None
        try:
            result = action()
        except (ValueError, OSError) as error:
            if isinstance(error, ValueError) and not for_user(error):
                raise
            cause, failure = error, f"{what}: {error}" if isinstance(error, OSError) else str(error)
        failures: list[str | None] = [failure]
        if self.world_size > 1:
            failures = [None] * self.world_size
            dist.all_gather_object(failures, failure)
        for rank, text in enumerate(failures):
            if text is not None:
                raise ValueError(text if rank == 0 else f"{text} (on rank {rank})") from cause
        return result  # type: ignore[return-value]  # no rank failed, so this one has a result


def world_from_environment() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) as torchrun states them; a plain process is (0, 1, 0, 1)."""
    read = os.environ.get
    return (
        int(read("RANK", "0")),
        int(read("WORLD_SIZE", "1")),
        int(read("LOCAL_RANK", "0")),
        int(read("LOCAL_WORLD_SIZE", "1")),
    )


def start(expert: int) -> Topology:
    """Join the process group and choose the device and the number of threads.

    A restarted worker group gets a store namespace of its own: torchrun keeps its store between attempts, and gloo
    would read the dead attempt's addresses from it ("connectFullMesh refused").
    """
    rank, world_size, local_rank, local_world_size = world_from_environment()
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
    if not dist.is_initialized():
        if world_size > 1:
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            # Under torchrun the agent owns the store and every rank is its client.
            owns = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            store: Store = TCPStore(address, port, world_size, is_master=owns, timeout=COLLECTIVE_TIMEOUT)
            store = PrefixStore(f"attempt_{attempt}", store)
        else:
            store = HashStore()
        dist.init_process_group(
            "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    return Topology(rank, world_size, local_rank, local_world_size, expert, device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
