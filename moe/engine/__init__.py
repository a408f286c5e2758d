"""Training engines. `prepare` and `build_engine` are the only ways to one; `moe.engine.base` is what they all offer."""

from __future__ import annotations

from torch import nn

from moe.config import Config
from moe.distributed.mesh import Mesh
from moe.engine.base import Engine


def prepare(config: Config, mesh: Mesh) -> Mesh:
    """The mesh with the process groups that the engine of `config` uses. A collective; before the model is built."""
    from moe.engine.deepspeed import engine

    return engine.prepare(mesh)


def build_engine(model: nn.Module, config: Config, mesh: Mesh) -> Engine:
    """The engine that `config` names, around a model on the mesh's device. A collective. Raises UserError."""
    from moe.engine.deepspeed import engine

    return engine.DeepSpeedEngine(model, config, mesh)
