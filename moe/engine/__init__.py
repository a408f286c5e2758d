"""Training engines. `prepare` and `build_engine` create one; `moe.engine.base` is the interface of all of them."""

from __future__ import annotations

from torch import nn

from moe.config import Config, EngineKind
from moe.distributed.mesh import Mesh
from moe.engine.base import Engine

# Engines are imported when they are chosen: importing DeepSpeed takes seconds.


def prepare(config: Config, mesh: Mesh) -> Mesh:
    """The mesh with the process groups that `config`'s engine needs. A collective; call before building the model."""
    if config.engine is EngineKind.plain:
        return mesh
    from moe.engine.deepspeed import engine

    return engine.prepare(mesh)


def build_engine(model: nn.Module, config: Config, mesh: Mesh) -> Engine:
    """The engine that `config` names, around a model on the mesh's device. A collective. Raises UserError."""
    if config.engine is EngineKind.plain:
        from moe.engine.plain import PlainEngine

        return PlainEngine(model, config, mesh)
    from moe.engine.deepspeed.engine import DeepSpeedEngine

    return DeepSpeedEngine(model, config, mesh)
