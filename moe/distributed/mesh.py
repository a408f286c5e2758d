"""Which rank this process is, how many there are, and which of them share experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from moe.distributed.collectives import Collectives


@dataclass(frozen=True, slots=True)
class Mesh(Collectives):
    """This process among `world_size`. Every rank is data-parallel for the dense weights; `expert_parallel_size`
    consecutive ranks share one set of experts, and ranks at the same place in their set hold the same ones.

    `expert_group` is this rank's set, None when it is this rank alone; an engine's `prepare` makes it.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    expert_parallel_size: int
    device: torch.device
    expert_group: ProcessGroup | None = None

    @property
    def data_parallel_size(self) -> int:
        """Ranks that each take their own micro-batches of a step."""
        return self.world_size

    @property
    def data_parallel_rank(self) -> int:
        return self.rank

    @property
    def expert_data_parallel_size(self) -> int:
        """Ranks that hold copies of the same experts."""
        return self.world_size // self.expert_parallel_size
