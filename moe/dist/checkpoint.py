"""Checkpoints: safetensors and JSON, no pickle; they load at any number of ranks and any expert-parallel degree.

    RUN_DIR/checkpoints/latest                     text: the newest folder's name
    RUN_DIR/checkpoints/step_00000200/model/       float32 weights under transformers' names, experts stacked
                                      optimizer/   exp_avg.NAME and exp_avg_sq.NAME
                                      state.json   TrainState
                                      config.yaml  the run's configuration
                                      manifest.json  size and SHA-256 of every file above

Order of a save, so that a folder without the `.partial` ending is always whole: every rank writes its shards into
`step_N.partial`; all agree that they could; rank 0 fsyncs every file, writes and fsyncs the manifest, renames the
folder, fsyncs its parent, and only then moves `latest`. Experts are DTensors over a (replicas, expert) mesh, which is
what lets torch.distributed.checkpoint cut them anew for another topology.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe.compose import read_config
from moe.config import Config
from moe.dist.engine import ADAM_MOMENTS, Engine
from moe.dist.topology import Topology
from moe.durable import PARTIAL, fsync, write_durably
from moe.model.transformer import Transformer



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
    torch: str = torch.__version__


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")


def _mesh(topology: Topology) -> DeviceMesh:
    ranks = torch.arange(topology.world_size).view(-1, topology.expert)
    return DeviceMesh("cpu", ranks, mesh_dim_names=("replica", "expert"))


def _sharded(tensors: dict[str, Tensor], experts: set[str], mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """Expert slices as DTensors that share memory with `tensors`; the rest as they are."""
    if mesh is None:
        return tensors
    return {
        name: DTensor.from_local(tensor, mesh, [Replicate(), Shard(0)]) if name in experts else tensor
        for name, tensor in tensors.items()
    }


def _moments(state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{moment}.{name}": tensor for moment in ADAM_MOMENTS for name, tensor in state[moment].items()}


class Checkpoints:
    """The checkpoints of one run: `save` and `load` are collectives, called by every rank in the same order."""

    def __init__(self, run_dir: Path, topology: Topology, keep: int) -> None:
        self.folder = run_dir / "checkpoints"
        self.topology = topology
        self.keep = keep
        self._mesh = _mesh(topology) if topology.expert > 1 else None

    def save(self, engine: Engine, state: TrainState, config_yaml: str) -> Path:
        """Raises OSError on every rank, naming the path, when any rank could not write; older checkpoints stay."""
        final = self.folder / f"step_{state.step:08d}"
        partial = final.with_name(final.name + PARTIAL)
        tensors = engine.master_state()
        experts = engine.expert_names
        moment_experts = {f"{moment}.{name}" for moment in ADAM_MOMENTS for name in experts}

        def write() -> None:
            try:
                for part, values, sharded in (
                    ("model", tensors["weights"], experts),
                    ("optimizer", _moments(tensors), moment_experts),
                ):
                    writer = HuggingFaceStorageWriter(str(partial / part), save_distributed=True)
                    state_dict_saver.save(_sharded(values, sharded, self._mesh), storage_writer=writer)
            except CheckpointException as error:  # raised on all ranks when any failed; not an Exception
                first = next(iter(error.failures.values()))[0]
                raise OSError(f"{partial}: could not be written ({first})") from error

        def commit() -> None:
            if not self.topology.is_main:
                return
            (partial / "state.json").write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
            (partial / "config.yaml").write_text(config_yaml, encoding="utf-8")
            manifest = {}
            for path in _files(partial):
                fsync(path)
                name = str(path.relative_to(partial))
                manifest[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            write_durably(partial / "manifest.json", json.dumps(manifest, indent=1) + "\n")
            for folder in (partial / "model", partial / "optimizer", partial):
                fsync(folder)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            fsync(self.folder)
            write_durably(self.folder / "latest", final.name + "\n")
            for old in committed(self.folder)[self.keep :]:
                shutil.rmtree(old)

        try:
            self.topology.agree(lambda: self._clear(partial), "checkpoint")
            self.topology.agree(write, "checkpoint")
            self.topology.agree(commit, "checkpoint")
        except ValueError as error:
            if self.topology.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            size = sum(t.nbytes for kind in tensors.values() for t in kind.values())
            free = shutil.disk_usage(self.folder).free
            raise OSError(
                f"{final}: not saved, {error}; this rank writes {size / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
            ) from error
        return final

    def _clear(self, partial: Path) -> None:
        if self.topology.is_main:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)

    def newest(self, log: Any) -> Path | None:
        """The newest checkpoint that verifies, the same on all ranks; each one passed over is logged and why."""
        found: list[str | None] = [None]
        if self.topology.is_main:
            for folder in committed(self.folder):
                reason = verify(folder)
                if reason is None:
                    found = [str(folder)]
                    break
                log(f"checkpoint {folder} is damaged and passed over: {reason}")
        if self.topology.world_size > 1:
            dist.broadcast_object_list(found, src=0)
        return Path(found[0]) if found[0] else None

    def load(self, folder: Path, engine: Engine) -> TrainState:
        """Weights, moments and counters into a fresh engine. Raises ValueError if the shapes differ."""
        state = read_state(folder)
        tensors = engine.empty_state()
        experts = engine.expert_names
        _read(folder / "model", _sharded(tensors["weights"], experts, self._mesh), alone=False)
        moment_experts = {f"{moment}.{name}" for moment in ADAM_MOMENTS for name in experts}
        _read(folder / "optimizer", _sharded(_moments(tensors), moment_experts, self._mesh), alone=False)
        engine.load_master_state(tensors, state.step - state.skipped_steps, state.skipped_steps)
        return state


def committed(folder: Path) -> list[Path]:
    """Whole checkpoints, newest first."""
    return sorted((p for p in folder.glob("step_*") if p.is_dir() and p.suffix != PARTIAL), reverse=True)


def verify(folder: Path) -> str | None:
    """None if every file of the manifest is there with its size and SHA-256, else what is wrong."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, the manifest says {expected['bytes']}"
            if _sha256(path) != expected["sha256"]:
                return f"{name} does not match its SHA-256"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json can't be read ({error})"
    return None


def read_state(folder: Path) -> TrainState:
    """Raises ValueError naming the file."""
    path = folder / "state.json"
    try:
        before_the_guard = {"recent_norms": [], "refused_in_a_row": 0}  # a state written without them is whole too
        values = before_the_guard | json.loads(path.read_text(encoding="utf-8"))
        return TrainState(**{one.name: values[one.name] for one in fields(TrainState)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a training state ({error!r})") from error


def resolve(path: Path) -> Path:
    """A run directory, its `checkpoints` or one checkpoint → the checkpoint's folder. Raises ValueError."""
    for folder in (path, path / "checkpoints"):
        newest = committed(folder)
        if newest:
            return next((one for one in newest if verify(one) is None), newest[0])
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
    _read(folder / "model", weights, alone=True)  # in place: the tensors share the parameters' memory
    return model.eval()


# Loading in one process is what is meant where torch says it assumes that.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _read(folder: Path, into: dict[str, Tensor], *, alone: bool) -> None:
    try:
        state_dict_loader.load(into, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise ValueError(f"{folder}: does not fit this model ({first})") from error
