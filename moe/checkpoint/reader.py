"""Checkpoints: safetensors and JSON, no pickle; they load at any number of ranks and any expert-parallel degree.

    RUN_DIR/checkpoints/latest                     text: the newest folder's name
    RUN_DIR/checkpoints/step_00000200/model/       float32 weights under transformers' names, experts stacked
                                      optimizer/   exp_avg.NAME and exp_avg_sq.NAME
                                      state.json   TrainState
                                      config.yaml  the run's configuration
                                      manifest.json  size and SHA-256 of every file above

This file reads them, `moe.dist.save` writes them. Experts are DTensors over a (replicas, expert) mesh, which is what
lets torch.distributed.checkpoint cut them anew for another topology.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe import __version__
from moe.compose import read_config
from moe.config import Config
from moe.dist.engine import Engine
from moe.dist.master import ADAM_MOMENTS, KINDS, States
from moe.dist.topology import Topology
from moe.model.transformer import Transformer

NAME = re.compile(r"step_\d{8,}")
MANIFEST = "manifest.json"
TEXTS = {"state.json", "config.yaml"}
READ_BYTES = 2 << 30  # of tensors that a rank reads at once


def _versions() -> dict[str, str]:
    return {"moe": __version__, "torch": torch.__version__, "deepspeed": version("deepspeed")}


@dataclass(kw_only=True, slots=True)
class TrainState:
    """All that a resume needs beside the tensors. `consumed` is the loader's whole state (samples, all ranks);
    `recent_norms` and `refused_in_a_row` are the guard's (`moe.train.guard`)."""

    step: int = 0
    consumed: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    recent_norms: list[float] = field(default_factory=list)
    refused_in_a_row: int = 0
    tokenizer: str = ""
    data: str = ""
    versions: dict[str, str] = field(default_factory=_versions)


class Experts:
    """How the expert tensors of a run lie over its ranks. Making one is a collective."""

    def __init__(self, names: set[str], topology: Topology) -> None:
        self._names = names
        self._mesh: DeviceMesh | None = None
        if topology.expert > 1:
            ranks = torch.arange(topology.world_size).view(-1, topology.expert)
            self._mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("replica", "expert"))

    def sharded(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Expert slices as DTensors that share memory with `tensors`; the rest as they are."""
        if self._mesh is None:
            return tensors
        return {
            name: DTensor.from_local(tensor, self._mesh, [Replicate(), Shard(0)]) if name in self._names else tensor
            for name, tensor in tensors.items()
        }


def load(folder: Path, engine: Engine, topology: Topology) -> TrainState:
    """Weights, moments and counters into a fresh engine. A collective. Raises ValueError if the shapes differ."""
    state = topology.agree(lambda: read_state(folder), "resume")
    experts = Experts(engine.expert_names, topology)
    model, optimizer = _Reader(folder / "model"), _Reader(folder / "optimizer")

    def parts() -> Iterator[States]:
        for tensors in engine.master.empty(READ_BYTES):
            sharded = {kind: experts.sharded(tensors[kind]) for kind in KINDS}
            moments = {f"{kind}.{name}": t for kind in ADAM_MOMENTS for name, t in sharded[kind].items()}
            model.fill(sharded["weights"])
            optimizer.fill(moments)
            yield tensors

    topology.agree(lambda: engine.master.fill(parts(), state.step - state.skipped_steps), "resume")
    engine.resumed(state.step, state.skipped_steps)
    return state


def newest(run_dir: Path, topology: Topology, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, the same on all ranks; each one passed over is told, and why. A collective.

    Raises ValueError when there are checkpoints but none is whole: starting anew in their place would lose them.
    """
    root = run_dir / "checkpoints"
    folders = topology.from_main(topology.agree(lambda: committed(root), "resume"))
    damaged: list[Path] = []
    for folder in folders:
        # Hashing is what takes time: each rank has its share of the files.
        reasons = topology.gather(verify(folder, topology.rank, topology.world_size))
        reason = next((one for one in reasons if one is not None), None)
        if reason is None:
            topology.agree(lambda: _set_aside(damaged) if topology.is_main else None, "resume")
            return folder
        warn(f"checkpoint {folder} is damaged and passed over: {reason}")
        damaged.append(folder)
    if damaged:
        raise ValueError(
            f"{run_dir}: none of its {len(damaged)} checkpoints is whole (see above): mend one, or start another "
            "run with run_dir=…"
        )
    if topology.from_main((root / "latest").exists()):
        raise ValueError(
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


def committed(folder: Path) -> list[Path]:
    """Whole checkpoints, newest first. Raises OSError when the folder is there but can't be read: it may be full."""
    try:
        found = [entry.name for entry in os.scandir(folder) if NAME.fullmatch(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        return []
    return sorted((folder / name for name in found), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """None if the manifest's files are there with their size and SHA-256, else what is wrong.

    Of several callers each takes every `parts`-th file, beginning with number `part`.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not manifest.keys() >= TEXTS:
            return f"{MANIFEST} doesn't list {' and '.join(sorted(TEXTS - manifest.keys()))}"
        for name, expected in sorted(manifest.items())[part::parts]:
            path = folder / name
            if not path.is_file():
                return f"{name} of {MANIFEST} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {MANIFEST} says {expected['bytes']}"
            if sha256(path) != expected["sha256"]:
                return f"{name} does not match its SHA-256 in {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} can't be read ({error})"
    return None


def read_state(folder: Path) -> TrainState:
    """Raises ValueError naming the file."""
    path = folder / "state.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return TrainState(**{field.name: values[field.name] for field in fields(TrainState) if field.name in values})
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a training state ({error!r})") from error


def resolve(path: Path) -> Path:
    """A run directory, its `checkpoints` or one checkpoint → the checkpoint's folder. Raises ValueError."""
    for folder in (path, path / "checkpoints"):
        found = committed(folder)
        if found:
            return next((one for one in found if verify(one) is None), found[0])
    if (path / "model").is_dir():
        return path
    raise ValueError(f"checkpoint={path}: no checkpoint there; expected a run directory or a step_N folder of one")


def load_model(folder: Path) -> Transformer:
    """The whole model of one checkpoint, in one process, float32 on the CPU. Raises ValueError."""
    reason = verify(folder)
    if reason is not None:
        raise ValueError(f"{folder}: damaged checkpoint, {reason}")
    config: Config = read_config(folder / "config.yaml")
    model = Transformer(config.model, config.router, config.experts)
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
        """Raises ValueError."""
        try:
            state_dict_loader.load(tensors, storage_reader=self, no_dist=True)
        except CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            raise ValueError(f"{self.path}: does not fit this model ({first})") from error
