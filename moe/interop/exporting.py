"""`moe export`: a checkpoint becomes a Hugging Face model folder, in the layout that transformers writes.

moe export checkpoint=runs/tiny-stdlib path=exported
moe export checkpoint=runs/tiny-stdlib path=exported dtype=bfloat16
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.checkpoint.base import find_base
from moe.checkpoint.layout import CONFIG
from moe.checkpoint.reader import resolve, tokenizer_folder
from moe.checkpoint.state import TrainState, read_state
from moe.config import Config, ExportConfig, ExportDtype, ExportFormat
from moe.config.compose import read_config
from moe.data.tokenizer import load_saved
from moe.data.tokenizer_base import Tokenizer
from moe.durable import fsync
from moe.errors import UserError
from moe.interop.families import Family, family_for
from moe.interop.families.base import DiskTensor
from moe.interop.hub_folder import INDEX
from moe.interop.hub_tokenizer import hub_tokenizer_files
from moe.interop.merged import MergedTensors
from moe.interop.model_folder import in_files
from moe.interop.new_folder import new_folder
from moe.interop.peft_adapter import export_adapter
from moe.interop.tensor_files import TensorInfo, write_tensor_file
from moe.interop.tensor_source import CheckpointTensors, TensorSource, expected_shapes, header_flaw

GB = 10**9
TRAINING_ONLY = (".gate.noise_weight",)  # ends of names: what no forward pass in evaluation uses


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote: the family's architecture, the number of tensors and files, their bytes."""

    architecture: str
    tensors: int
    files: int
    total_bytes: int


def run_export(config: ExportConfig, warn: Callable[[str], None]) -> str:
    """Exports, and says what was written. `warn` gets a line for each damaged checkpoint that is passed over. Raises
    UserError, OSError."""
    folder = resolve(Path(config.checkpoint).expanduser(), warn, header_flaw)
    path, described, state = Path(config.path).expanduser(), read_config(folder / CONFIG), read_state(folder)
    source: TensorSource = CheckpointTensors(folder)
    if described.adapter.trains_adapter:
        base = find_base(folder, state)
        if config.format is ExportFormat.peft:
            return export_adapter(folder, described, base, path)
        source = MergedTensors(CheckpointTensors(base), CheckpointTensors(folder), described.adapter)
    elif config.format is ExportFormat.peft:
        raise UserError(f"format=peft: {folder} holds a whole model, no adapter: leave format out")
    exported = export_model(
        source,
        described,
        load_saved(tokenizer_folder(folder)),
        path,
        state=state,
        family=config.family,
        dtype=config.dtype,
        shard_bytes=int(config.max_shard_gb * GB),
    )
    return (
        f"{path}: {exported.architecture}, {exported.tensors:,} tensors in {exported.files} files, "
        f"{exported.total_bytes / GB:.3g} GB"
    )


def export_model(
    source: TensorSource,
    config: Config,
    tokenizer: Tokenizer,
    path: Path,
    *,
    state: TrainState | None = None,
    family: str | None = None,
    dtype: ExportDtype = ExportDtype.stored,
    shard_bytes: int = 5 * GB,
) -> Exported:
    """Writes the new folder `path`. `source` gives the tensors of the model that `config` describes, one at a time: a
    checkpoint's, or what a transformation makes of them. Raises UserError, OSError; nothing is left half-done."""
    state = state or TrainState()
    chosen, hub_config = family_for(config.model, config.router, state.step, family)
    there = {name: info for name, info in source.infos().items() if not name.endswith(TRAINING_ONLY)}
    tensors, infos = _planned(chosen, config, there, dtype)
    files = in_files(infos, shard_bytes)
    common = _dtype_name(infos)
    small = hub_tokenizer_files(tokenizer, config.model.max_position_embeddings)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    small["config.json"] = _json(hub_config | ids | {"torch_dtype": common})
    small["generation_config.json"] = _json(ids)
    total = sum(info.nbytes for info in infos.values())
    if len(files) > 1:
        where = {name: file for file, inside in files.items() for name in inside}
        small[INDEX] = _json({"metadata": {"total_size": total}, "weight_map": where})
    with new_folder(path, "path") as partial:
        for name, content in small.items():  # first: a full disk is noticed early
            (partial / name).write_bytes(content)
            fsync(partial / name)
        for name, inside in files.items():
            data = _data(source, [tensors[one] for one in inside], infos)
            write_tensor_file(partial / name, inside, data)
    return Exported(chosen.architecture, len(infos), len(files), total)


def _planned(
    family: Family, config: Config, there: dict[str, TensorInfo], dtype: ExportDtype
) -> tuple[dict[str, DiskTensor], dict[str, TensorInfo]]:
    """What is written, by name. Raises UserError where the source has not the tensors of `config`'s model."""
    shapes = expected_shapes(config.model, config.router)
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith(TRAINING_ONLY)}
    tensors, infos = {}, {}
    for name in sorted(there.keys() ^ shapes.keys()):
        raise UserError(
            f"{name} is {'missing' if name in shapes else 'no tensor of the model that config.yaml describes'}"
        )
    for name, shape in shapes.items():
        if there[name].shape != shape:
            raise UserError(f"{name} is {list(there[name].shape)}, and config.yaml's is {list(shape)}")
        as_is = there[name].dtype if dtype is ExportDtype.stored else getattr(torch, dtype.name)
        for part in family.on_disk(name, shape):
            tensors[part.name], infos[part.name] = part, TensorInfo(as_is, part.shape)
    return tensors, infos


def _data(source: TensorSource, parts: list[DiskTensor], infos: dict[str, TensorInfo]) -> Iterator[Tensor]:
    """Each part's values; parts of one expert's tensor come from one read."""
    last: tuple[str, int | None] | None = None
    tensor = torch.empty(0)
    for part in parts:
        if (part.ours, part.expert) != last:
            last = (part.ours, part.expert)
            tensor = source.read(*last)
        rows = tensor if part.rows is None else tensor[slice(*part.rows)]
        yield rows.to(infos[part.name].dtype)


def _dtype_name(infos: dict[str, TensorInfo]) -> str:
    """The dtype that most of the weights have."""
    sizes: dict[torch.dtype, int] = {}
    for info in infos.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return str(max(sizes, key=sizes.__getitem__)).removeprefix("torch.")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
