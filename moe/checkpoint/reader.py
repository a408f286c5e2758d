"""Reads checkpoints (`moe.checkpoint.layout`): a resume, and a whole model in one process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from moe.adapters.merge import is_part
from moe.checkpoint.base import fill_merged, find_base, model_part
from moe.checkpoint.layout import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    LATEST,
    MODEL,
    NAME,
    OPTIMIZER,
    PARTS,
    TOKENIZER,
    committed,
    key_in_file,
)
from moe.checkpoint.manifest import lists_any, strays, verify
from moe.checkpoint.sharding import ExpertSharding
from moe.checkpoint.state import TrainState, read_state
from moe.checkpoint.untrained import untrained_tensors
from moe.config import AttentionBackend, Config, ExpertsConfig
from moe.config.compose import read_config
from moe.distributed.mesh import Mesh
from moe.engine.base import MOMENTS, Engine, States
from moe.engine.parameters import expert_names
from moe.errors import UserError
from moe.model.build import empty_model
from moe.model.transformer import Transformer
from moe.plan.fit import check_model
from moe.sparse import routers_of
from moe.untrusted import read_small

if TYPE_CHECKING:  # it loads torch.distributed.checkpoint (moe.checkpoint.tensor_files)
    from moe.checkpoint.shards import ShardReader

CPU = torch.device("cpu")


def load(folder: Path, engine: Engine, mesh: Mesh) -> TrainState:
    """Weights, buffers, moments and counters into a fresh engine. A collective. Raises UserError if shapes differ."""
    state = mesh.agree(lambda: read_state(folder), "resume")
    if not mesh.from_main(lists_any(folder, OPTIMIZER)):
        raise UserError(f"{folder}: a model without its optimizer: init_from={folder} starts a run from it")
    _fill(engine, mesh, model_part(folder, MODEL), model_part(folder, OPTIMIZER), state.step - state.skipped_steps)
    engine.resumed(state.step, state.skipped_steps)
    return state


def load_weights(folder: Path, engine: Engine, mesh: Mesh) -> None:
    """Weights and buffers into a fresh engine, whose moments stay zero; an adapter keeps its initial values. A
    collective. Raises UserError."""
    _fill(engine, mesh, model_part(folder, MODEL), None, 0)
    engine.resumed(0, 0)


def _fill(engine: Engine, mesh: Mesh, model: ShardReader, optimizer: ShardReader | None, adam_steps: int) -> None:
    from moe.checkpoint.shards import READ_BYTES

    experts = ExpertSharding(engine.expert_names, mesh)

    def parts() -> Iterator[States]:
        for tensors in engine.optimizer_state.empty(READ_BYTES):
            if optimizer is None:
                tensors = {kind: {n: t for n, t in named.items() if not is_part(n)} for kind, named in tensors.items()}
            sharded = {kind: experts.sharded(named) for kind, named in tensors.items()}
            model.fill(sharded["weights"])
            if optimizer is not None:
                moments = ((kind, name, t) for kind in MOMENTS for name, t in sharded.get(kind, {}).items())
                optimizer.fill({key_in_file(kind, name): tensor for kind, name, tensor in moments})
            yield tensors

    mesh.agree(lambda: engine.optimizer_state.fill(parts(), adam_steps), "checkpoint")
    fill = partial(model.fill_untrained, engine.model, experts.sharded, adapters=optimizer is not None)
    mesh.agree(fill, "checkpoint")


def tokenizer_folder(checkpoint: Path) -> Path:
    """Where the tokenizer of this checkpoint's model is. Raises OSError, ValueError."""
    inside = lists_any(checkpoint, TOKENIZER)
    return checkpoint / TOKENIZER if inside else checkpoint.resolve().parent.parent / TOKENIZER


def misfits(folder: Path, model: nn.Module, mesh: Mesh) -> list[str]:
    """Which tensors of the checkpoint's model aren't those of this run, or have another shape, a line each."""
    saved = {name: list(entry.size) for name, entry in model_part(folder, MODEL).tensors().items()}
    here = dict(model.named_parameters()) | untrained_tensors(model)
    shapes = {name: list(tensor.shape) for name, tensor in here.items() if not is_part(name)}
    for name in expert_names(model) & shapes.keys():
        shapes[name][0] *= mesh.expert_parallel_size
    return [
        f"{name} is {saved.get(name, 'missing')} there, {shapes.get(name, 'missing')} here"
        for name in sorted(saved.keys() | shapes.keys())
        if saved.get(name) != shapes.get(name)
    ]


def newest(run_dir: Path, mesh: Mesh, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, the same on all ranks; with a warning for each one skipped. A collective.

    Raises UserError when there are checkpoints but none is whole: starting over in their place would lose them.
    """
    root = run_dir / CHECKPOINTS
    folders = mesh.from_main(mesh.agree(lambda: committed(root), "resume"))
    damaged: list[Path] = []
    for folder in folders:
        reason = damage(folder, mesh)
        if reason is None:
            mesh.agree(lambda: _set_aside(damaged) if mesh.is_main else None, "resume")
            warn_of_strays(folder, warn)
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


def warn_of_strays(folder: Path, warn: Callable[[str], None]) -> None:
    """A warning for each file of a checkpoint's folders that isn't read, since its manifest doesn't list it."""
    for path in strays(folder):
        warn(f"{path} is not in the checkpoint's manifest and is not read")


def damage(folder: Path, mesh: Mesh) -> str | None:
    """What is wrong with a checkpoint, None if it is whole; the same on all ranks. A collective."""
    # Hashing is what takes time: each rank has its share of the files.
    reasons = mesh.gather(
        verify(folder, mesh.rank, mesh.world_size) or (_flaw(folder, *PARTS) if mesh.is_main else None)
    )
    return next((reason for reason in reasons if reason is not None), None)


def _flaw(folder: Path, *parts: str) -> str | None:
    """What keeps the files that the manifest lists from holding each tensor once; from their headers alone."""
    for part in parts:
        try:
            flaw = model_part(folder, part).flaw()
        except Exception as error:  # safetensors' errors have no class of their own that all versions share
            flaw = f"can't be read ({error})"
        if flaw is not None:
            return f"{part}: {flaw}"
    return None


def candidates(path: Path, key: str) -> list[Path]:
    """A run directory, its `checkpoints` or one checkpoint → the checkpoints there, newest first, at least one; of
    RUN_DIR/checkpoints/best the one that it names.

    Raises UserError naming the configuration's `key` for the path.
    """
    if path.name in (BEST, LATEST) and path.is_file():
        name = read_small(path, 100).decode(errors="replace").strip()
        if NAME.fullmatch(name) and (path.parent / name).is_dir():
            return [path.parent / name]
        raise UserError(f"{key}={path}: names {name!r}, which is no checkpoint beside it")
    for folder in (path, path / CHECKPOINTS):
        if found := committed(folder):
            return found
    if (path / MODEL).is_dir():
        return [path]
    expected = "expected a run directory or a step_N folder of one"
    if (path / "config.json").is_file():
        expected = f"a Hugging Face folder: `moe import checkpoint={path} run_dir=NEW` makes one of it"
    raise UserError(f"{key}={path}: no checkpoint there; {expected}")


def _silent(_: str) -> None:
    """Says nothing."""


def _model_flaw(folder: Path) -> str | None:
    return _flaw(folder, MODEL)


def resolve(
    path: Path, warn: Callable[[str], None] = _silent, flaw: Callable[[Path], str | None] = _model_flaw
) -> Path:
    """The newest of `candidates` whose model is whole: the files that `read_model` and `tokenizer_folder` read have
    their SHA-256. `warn` gets a line for each that is passed over; `flaw` says what keeps verified files from holding
    each tensor once. Raises UserError when none is whole."""
    damaged: list[str] = []
    for folder in candidates(path, "checkpoint"):
        reason = verify(folder, without=OPTIMIZER) or flaw(folder)
        if reason is None:
            for line in damaged:
                warn(f"{line}; {folder} is read in its place")
            warn_of_strays(folder, warn)
            return folder
        damaged.append(f"{folder}: damaged checkpoint, {reason}")
    raise UserError(damaged[0])


def load_model(path: Path) -> Transformer:
    """The model of the newest whole checkpoint, float32 on the CPU. Raises UserError."""
    return read_model(resolve(path))


def read_model(
    folder: Path,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    check_memory: bool = True,
) -> Transformer:
    """The whole model of a checkpoint that `resolve` has verified, in one process; an adapter's is merged. Raises
    UserError; `check_memory=False` loads one that is larger than the memory there is. The back-ends are this machine's,
    not those of the training run."""
    config: Config = read_config(folder / CONFIG)
    config = replace(config, experts=ExpertsConfig(), model=replace(config.model, attention=AttentionBackend.auto))
    if check_memory:
        check_model(config, device, dtype)
    model, state = empty_model(config, device, dtype=dtype), read_state(folder)
    reader = model_part(folder, MODEL)
    if config.adapter.trains_adapter:
        fill_merged(model, find_base(folder, state), folder, config)
    else:  # in place: the tensors share the parameters' memory
        reader.fill({name: value.detach() for name, value in model.named_parameters()})
    reader.fill_untrained(model)
    step = state.step
    for router in routers_of(model):
        router.begin_step(max(0, step - 1), config.train.steps)  # the last step that it was trained in
    return model.eval()
