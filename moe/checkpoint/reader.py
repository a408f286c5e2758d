"""Reads checkpoints (`moe.checkpoint.layout`): a resume, and a whole model in one process."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from moe.checkpoint.layout import committed, verify
from moe.checkpoint.sharding import ExpertSharding
from moe.checkpoint.state import TrainState, read_state
from moe.config import Config
from moe.config.compose import read_config
from moe.distributed.mesh import Mesh
from moe.engine.base import ADAM_MOMENTS, KINDS, Engine, States
from moe.errors import UserError
from moe.model.build import empty_model
from moe.model.transformer import Transformer

READ_BYTES = 2 << 30  # of tensors that a rank reads at once


def load(folder: Path, engine: Engine, mesh: Mesh) -> TrainState:
    """Weights, moments and counters into a fresh engine. A collective. Raises UserError if the shapes differ."""
    state = mesh.agree(lambda: read_state(folder), "resume")
    experts = ExpertSharding(engine.expert_names, mesh)
    model, optimizer = _Reader(folder / "model"), _Reader(folder / "optimizer")

    def parts() -> Iterator[States]:
        for tensors in engine.optimizer_state.empty(READ_BYTES):
            sharded = {kind: experts.sharded(tensors[kind]) for kind in KINDS}
            moments = {f"{kind}.{name}": t for kind in ADAM_MOMENTS for name, t in sharded[kind].items()}
            model.fill(sharded["weights"])
            optimizer.fill(moments)
            yield tensors

    mesh.agree(lambda: engine.optimizer_state.fill(parts(), state.step - state.skipped_steps), "resume")
    engine.resumed(state.step, state.skipped_steps)
    return state


def newest(run_dir: Path, mesh: Mesh, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, the same on all ranks; each one passed over is told, and why. A collective.

    Raises UserError when there are checkpoints but none is whole: starting anew in their place would lose them.
    """
    root = run_dir / "checkpoints"
    folders = mesh.from_main(mesh.agree(lambda: committed(root), "resume"))
    damaged: list[Path] = []
    for folder in folders:
        # Hashing is what takes time: each rank has its share of the files.
        reasons = mesh.gather(verify(folder, mesh.rank, mesh.world_size))
        reason = next((one for one in reasons if one is not None), None)
        if reason is None:
            mesh.agree(lambda: _set_aside(damaged) if mesh.is_main else None, "resume")
            return folder
        warn(f"checkpoint {folder} is damaged and passed over: {reason}")
        damaged.append(folder)
    if damaged:
        raise UserError(
            f"{run_dir}: none of its {len(damaged)} checkpoints is whole (see above): mend one, or start another "
            "run with run_dir=…"
        )
    if mesh.from_main((root / "latest").exists()):
        raise UserError(
            f"{root}/latest is there, but no checkpoint: bring one back, or start another run with run_dir=… (or here, "
            "from step 0, once that file is gone)"
        )
    return None


def _set_aside(damaged: list[Path]) -> None:
    """Out of the way of retention and of the next resume, which might find them readable again: kept, not removed."""
    for folder in damaged:
        aside = folder.with_name(f"{folder.name}.damaged")
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)


def resolve(path: Path) -> Path:
    """A run directory, its `checkpoints` or one checkpoint → the checkpoint's folder. Raises UserError."""
    for folder in (path, path / "checkpoints"):
        found = committed(folder)
        if found:
            return next((one for one in found if verify(one) is None), found[0])
    if (path / "model").is_dir():
        return path
    raise UserError(f"checkpoint={path}: no checkpoint there; expected a run directory or a step_N folder of one")


def load_model(folder: Path) -> Transformer:
    """The whole model of one checkpoint, in one process, float32 on the CPU. Raises UserError."""
    reason = verify(folder)
    if reason is not None:
        raise UserError(f"{folder}: damaged checkpoint, {reason}")
    config: Config = read_config(folder / "config.yaml")
    model = empty_model(config, torch.device("cpu"))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    _Reader(folder / "model").fill(weights)  # in place: the tensors share the parameters' memory
    return model.eval()


# Every rank reads what it needs, without the others: what torch then says it assumes is what is meant.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class _Reader(HuggingFaceStorageReader):
    """One part of a checkpoint; opens each file's header once, however often tensors are read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._metadata: Any = None

    def read_metadata(self) -> Any:
        if self._metadata is None:
            self._metadata = super().read_metadata()
        return self._metadata

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Raises UserError."""
        try:
            state_dict_loader.load(tensors, storage_reader=self, no_dist=True)
        except CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            raise UserError(f"{self.path}: does not fit this model ({first})") from error
