"""An adapter's checkpoint holds the parameters that train; its base, another checkpoint, holds the frozen weights."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe.adapters.merge import adapted, is_part, merged
from moe.checkpoint.layout import MANIFEST, MODEL, OPTIMIZER
from moe.checkpoint.manifest import read_manifest, shards_of, verify
from moe.checkpoint.sharding import ExpertSharding
from moe.checkpoint.state import TrainState
from moe.config import Config
from moe.distributed.mesh import Mesh
from moe.durable import new_folder, write_durably
from moe.engine.parameters import expert_names
from moe.errors import UserError
from moe.model.transformer import Transformer

if TYPE_CHECKING:  # it loads torch.distributed.checkpoint (moe.checkpoint.tensor_files)
    from moe.checkpoint.shards import ShardReader


def model_part(folder: Path, part: str = MODEL) -> ShardReader:
    """Reads the files of `part` that the manifest lists. Raises UserError."""
    from moe.checkpoint.shards import ShardReader

    names = [Path(name).name for name in shards_of(_manifest(folder), part)]
    return ShardReader(folder / part, names)


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return read_manifest(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: damaged checkpoint ({error})") from error


def model_fingerprint(folder: Path) -> str:
    """SHA-256 over names and hashes of the files that hold the model. Raises UserError."""
    manifest = _manifest(folder)
    files = [[name, manifest[name]["sha256"]] for name in shards_of(manifest, MODEL)]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def link_model(checkpoint: Path, folder: Path) -> None:
    """Makes the checkpoint `folder` of all files of `checkpoint` but the optimizer's: hard links to its tensors, which
    take no room and are still there when `checkpoint` has been removed, and copies of the small files. Raises
    UserError, and OSError where there can be no links, as between two file systems; nothing is left half-done."""
    manifest = {name: one for name, one in _manifest(checkpoint).items() if not name.startswith(f"{OPTIMIZER}/")}
    with new_folder(folder, "run_dir") as partial:
        for name in manifest:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            if name.startswith(f"{MODEL}/"):
                os.link((checkpoint / name).resolve(), partial / name)
            else:
                write_durably(partial / name, (checkpoint / name).read_bytes())
        write_durably(partial / MANIFEST, json.dumps(manifest, indent=1))


def find_base(checkpoint: Path, state: TrainState) -> Path:
    """The base of an adapter's checkpoint, whole and unchanged since. Raises UserError."""
    base = Path(state.base)
    if not base.is_absolute():  # inside the run directory
        base = checkpoint.resolve().parent.parent / base
    if not base.is_dir():
        raise UserError(
            f"{checkpoint}: an adapter of the weights in {base}, which are not there: put them back (the adapter alone "
            "is no model)"
        )
    if (reason := verify(base, without=OPTIMIZER)) is not None:
        raise UserError(f"{base}: damaged checkpoint, {reason}; {checkpoint} is an adapter of it")
    if model_fingerprint(base) != state.base_fingerprint:
        raise UserError(f"{checkpoint}: an adapter of other weights than {base} holds now: put the earlier ones back")
    return base


def fill_base(folder: Path, model: Transformer, mesh: Mesh) -> None:
    """The frozen weights (`Transformer.base_names`) of this rank. A collective. Raises UserError."""
    experts = ExpertSharding(expert_names(model), mesh)
    tensors = {name: value.detach() for name, value in model.named_parameters() if name in model.base_names}
    mesh.agree(lambda: model_part(folder).fill(experts.sharded(tensors)), "init_from")  # in place


def fill_merged(model: Transformer, base: Path, checkpoint: Path, config: Config) -> None:
    """A whole model without adapters, in one process, from a base and its adapter's checkpoint. Raises UserError."""
    reader = model_part(checkpoint)
    saved = reader.tensors()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    own = parameters.keys() & saved.keys()  # trained in full
    model_part(base).fill({name: value for name, value in parameters.items() if name not in own})
    reader.fill({name: parameters[name] for name in own})
    names = {name for name in saved if is_part(name)}

    def read(name: str) -> Tensor:
        into = {name: torch.empty(saved[name].size)}
        reader.fill(into)
        return into[name]

    for name in parameters.keys() & map(adapted, names):
        parameters[name].copy_(merged(name, parameters[name].cpu(), names, read, config.adapter))
