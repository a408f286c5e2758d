"""Reads checkpoints (`moe.checkpoint.layout`): a resume, and a whole model in one process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from moe.checkpoint.layout import CHECKPOINTS, CONFIG, LATEST, MODEL, OPTIMIZER, committed, key_in_file, verify
from moe.checkpoint.sharding import ExpertSharding
from moe.checkpoint.state import TrainState, read_state
from moe.checkpoint.untrained import empty_parts, untrained_tensors
from moe.config import Config
from moe.config.compose import read_config
from moe.distributed.mesh import Mesh
from moe.engine.base import ADAM_MOMENTS, KINDS, Engine, States
from moe.errors import UserError
from moe.model.build import empty_model
from moe.model.transformer import Transformer
from moe.plan.fit import check_model
from moe.sparse import routers_of

READ_BYTES = 2 << 30  # of tensors that a rank reads at once


def load(folder: Path, engine: Engine, mesh: Mesh) -> TrainState:
    """Weights, buffers, moments and counters into a fresh engine. A collective. Raises UserError if shapes differ."""
    state = mesh.agree(lambda: read_state(folder), "resume")
    if mesh.from_main(not (folder / OPTIMIZER).is_dir()):
        raise UserError(f"{folder}: a model without its optimizer: checkpoint.init_from={folder} starts a run from it")
    _fill(engine, mesh, _Reader(folder / MODEL), _Reader(folder / OPTIMIZER), state.step - state.skipped_steps)
    engine.resumed(state.step, state.skipped_steps)
    return state


def load_weights(folder: Path, engine: Engine, mesh: Mesh) -> None:
    """Weights and buffers into a fresh engine, whose moments stay zero. A collective. Raises UserError."""
    _fill(engine, mesh, _Reader(folder / MODEL), None, 0)
    engine.resumed(0, 0)


def _fill(engine: Engine, mesh: Mesh, model: _Reader, optimizer: _Reader | None, adam_steps: int) -> None:
    experts = ExpertSharding(engine.expert_names, mesh)

    def parts() -> Iterator[States]:
        for tensors in engine.optimizer_state.empty(READ_BYTES):
            sharded = {kind: experts.sharded(tensors[kind]) for kind in KINDS}
            model.fill(sharded["weights"])
            if optimizer is not None:
                moments = ((kind, name, t) for kind in ADAM_MOMENTS for name, t in sharded[kind].items())
                optimizer.fill({key_in_file(kind, name): tensor for kind, name, tensor in moments})
            yield tensors

    mesh.agree(lambda: engine.optimizer_state.fill(parts(), adam_steps), "checkpoint")
    mesh.agree(lambda: model.fill_untrained(engine.model, experts.sharded), "checkpoint")


def misfits(folder: Path, engine: Engine, mesh: Mesh) -> list[str]:
    """Which tensors of the checkpoint's model aren't those of this run, or have another shape, a line each."""
    saved = {
        name: list(entry.size) for name, entry in _Reader(folder / MODEL).read_metadata().state_dict_metadata.items()
    }
    here = dict(engine.model.named_parameters()) | untrained_tensors(engine.model)
    shapes = {name: list(tensor.shape) for name, tensor in here.items()}
    for name in engine.expert_names:
        shapes[name][0] *= mesh.expert_parallel_size
    return [
        f"{name} is {saved.get(name, 'missing')} there, {shapes.get(name, 'missing')} here"
        for name in sorted(saved.keys() | shapes.keys())
        if saved.get(name) != shapes.get(name)
    ]


def newest(run_dir: Path, mesh: Mesh, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, the same on all ranks; with a warning for each one skipped. A collective.

    Raises UserError when there are checkpoints but none is whole: starting anew in their place would lose them.
    """
    root = run_dir / CHECKPOINTS
    folders = mesh.from_main(mesh.agree(lambda: committed(root), "resume"))
    damaged: list[Path] = []
    for folder in folders:
        reason = damage(folder, mesh)
        if reason is None:
            mesh.agree(lambda: _set_aside(damaged) if mesh.is_main else None, "resume")
            return folder
        warn(f"checkpoint {folder} is damaged and passed over: {reason}")
        damaged.append(folder)
    if damaged:
        raise UserError(
            f"{run_dir}: none of its {len(damaged)} checkpoints is whole (see above): restore one, or start another "
            "run with run_dir=…"
        )
    if mesh.from_main((root / LATEST).exists()):
        raise UserError(
            f"{root / LATEST} is there, but no checkpoint: bring one back, or start another run with run_dir=… (or "
            "here, from step 0, once that file is gone)"
        )
    return None


def _set_aside(damaged: list[Path]) -> None:
    """Renames damaged checkpoints, so that retention and the next resume ignore them; they are kept, not deleted."""
    for folder in damaged:
        aside = folder.with_name(f"{folder.name}.damaged")
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)


def damage(folder: Path, mesh: Mesh) -> str | None:
    """What is wrong with a checkpoint, None if it is whole; the same on all ranks. A collective."""
    # Hashing is what takes time: each rank has its share of the files.
    reasons = mesh.gather(verify(folder, mesh.rank, mesh.world_size))
    return next((reason for reason in reasons if reason is not None), None)


def candidates(path: Path, key: str) -> list[Path]:
    """A run directory, its `checkpoints` or one checkpoint → the checkpoints there, newest first, at least one.

    Raises UserError naming the configuration's `key` for the path.
    """
    for folder in (path, path / CHECKPOINTS):
        if found := committed(folder):
            return found
    if (path / MODEL).is_dir():
        return [path]
    raise UserError(f"{key}={path}: no checkpoint there; expected a run directory or a step_N folder of one")


def resolve(path: Path) -> Path:
    """The newest whole checkpoint of `candidates`; the newest when none is whole. Raises UserError."""
    found = candidates(path, "checkpoint")
    if len(found) == 1:
        return found[0]
    return next((one for one in found if verify(one) is None), found[0])


def load_model(folder: Path, *, check_memory: bool = True) -> Transformer:
    """The whole model of one checkpoint, in one process, float32 on the CPU. Raises UserError; `check_memory=False`
    loads one that is larger than the memory there is."""
    reason = verify(folder)
    if reason is not None:
        raise UserError(f"{folder}: damaged checkpoint, {reason}")
    config: Config = read_config(folder / CONFIG)
    if check_memory:
        check_model(config)
    model = empty_model(config, torch.device("cpu"))
    reader = _Reader(folder / MODEL)
    # In place: the tensors share the parameters' memory.
    reader.fill({name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad})
    reader.fill_untrained(model)
    step = read_state(folder).step
    for router in routers_of(model):
        router.begin_step(max(0, step - 1), config.train.steps)  # the last step that it was trained in
    return model.eval()


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

    def fill_untrained(
        self, model: nn.Module, sharded: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors
    ) -> None:
        """The tensors of `model` that no optimizer updates. Raises UserError if shapes or dtypes differ."""
        tensors = untrained_tensors(model)
        for part in empty_parts(tensors, READ_BYTES):
            self._check_dtypes(
                {name: value for name, value in part.items() if not isinstance(tensors[name], nn.Parameter)}
            )
            self.fill(sharded(part))
            for name, value in part.items():
                tensors[name].detach().copy_(value)

    def _check_dtypes(self, buffers: dict[str, Tensor]) -> None:
        saved = self.read_metadata().state_dict_metadata
        for name, buffer in buffers.items():
            if name in saved and saved[name].properties.dtype != buffer.dtype:
                raise UserError(
                    f"{self.path}: does not fit this model ({name} is {saved[name].properties.dtype}, "
                    f"the model's is {buffer.dtype})"
                )
