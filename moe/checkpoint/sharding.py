"""How a run's expert tensors lie over its ranks: DTensors over a (replicas, expert) mesh, which lets
torch.distributed.checkpoint redistribute them for another number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe.distributed.mesh import Mesh


class ExpertSharding:
    """How the expert tensors of a run lie over its ranks. Making one is a collective."""

    def __init__(self, names: set[str], mesh: Mesh) -> None:
        self._names = names
        self._mesh: DeviceMesh | None = None
        if mesh.expert_parallel_size > 1:
            ranks = torch.arange(mesh.world_size).view(-1, mesh.expert_parallel_size)
            self._mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("replica", "expert"))

    def sharded(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Expert slices as DTensors that share memory with `tensors`; the rest as they are."""
        if self._mesh is None:
            return tensors
        from torch.distributed.tensor import DTensor, Replicate, Shard  # here: it loads SymPy, at every rank's start

        return {
            name: DTensor.from_local(tensor, self._mesh, [Replicate(), Shard(0)]) if name in self._names else tensor
            for name, tensor in tensors.items()
        }
