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
from moe.config.rules import require
from moe.data.tokenizer import load_saved
from moe.data.tokenizer_base import Tokenizer
from moe.durable import fsync, new_folder
from moe.errors import UserError
from moe.interop.families import Family, family_for
from moe.interop.families.base import DiskTensor
from moe.interop.gguf_file import FILE, check_gguf, gguf_tensors, require_gguf, write_gguf
from moe.interop.hub_folder import INDEX
from moe.interop.hub_tokenizer import hub_tokenizer_files, text_ends
from moe.interop.model_card import model_card, run_metrics
from moe.interop.model_folder import in_files
from moe.interop.peft_adapter import export_adapter
from moe.interop.tensor_files import TensorInfo, write_tensor_file
from moe.interop.tensor_source import TensorSource, expected_shapes, header_flaw, open_checkpoint

GB = 10**9
SHARD_GB = 5.0
CARD = "README.md"
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
    path = Path(config.path).expanduser()
    saved: Config = read_config(folder / CONFIG)
    state = read_state(folder)
    if config.format is ExportFormat.peft:
        require(
            saved.adapter.trains_adapter, f"format=peft: {folder} holds a whole model, no adapter: leave format out"
        )
        return export_adapter(folder, saved, find_base(folder, state), path)
    model = (open_checkpoint(folder, saved), saved, load_saved(tokenizer_folder(folder)))
    options: dict[str, Any] = {"state": state, "family": config.family, "dtype": config.dtype}
    options["metrics"] = run_metrics(folder, state.step)
    if config.format is ExportFormat.gguf:
        return export_gguf(*model, path, **options)
    exported = export_model(*model, path, **options, shard_bytes=int((config.max_shard_gb or SHARD_GB) * GB))
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
    shard_bytes: int = int(SHARD_GB * GB),
    metrics: dict[str, float] | None = None,
) -> Exported:
    """Writes the new folder `path`. `source` gives the tensors of the model that `config` describes, one at a time: a
    checkpoint's, or what a transformation makes of them. `state` and `metrics` go into the model card. Raises
    UserError, OSError; nothing is left half-done."""
    state = state or TrainState()
    chosen, hub_config = family_for(config.model, config.router, state.step, family)
    tensors, infos = _planned(chosen, _there(source, config), dtype)
    files = in_files(infos, shard_bytes)
    common = _dtype_name(infos)
    small = hub_tokenizer_files(tokenizer, config.model.max_position_embeddings)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    small["config.json"] = _json(hub_config | ids | {"torch_dtype": common})
    ends = text_ends(tokenizer)
    small["generation_config.json"] = _json(ids | {"eos_token_id": ends if len(ends) > 1 else ends[0]})
    small[CARD] = model_card(config, state, chosen.architecture, metrics or {}).encode()
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


def export_gguf(
    source: TensorSource,
    config: Config,
    tokenizer: Tokenizer,
    path: Path,
    *,
    state: TrainState | None = None,
    family: str | None = None,
    dtype: ExportDtype = ExportDtype.stored,
    metrics: dict[str, float] | None = None,
) -> str:
    """As `export_model`, of one GGUF file and the model card; says what was written. Raises UserError, OSError."""
    require_gguf()
    state = state or TrainState()
    chosen, hub_config = family_for(config.model, config.router, state.step, family)
    check_gguf(chosen, config.model, config.router, tokenizer)
    tensors = gguf_tensors(chosen, config.model, _there(source, config), dtype)
    with new_folder(path, "path") as partial:
        card = model_card(config, state, chosen.architecture, metrics or {})
        (partial / CARD).write_text(card, encoding="utf-8")
        top_k = hub_config.get("num_experts_per_tok", 0)
        size = write_gguf(partial / FILE, chosen, config, tokenizer, source, tensors, top_k)
        for name in (CARD, FILE):
            fsync(partial / name)
    return f"{path / FILE}: {chosen.architecture}, {len(tensors):,} tensors, {size / GB:.3g} GB"


def _there(source: TensorSource, config: Config) -> dict[str, TensorInfo]:
    """What the source has of `config`'s model, in the model's order. Raises UserError where it has other tensors."""
    there = {name: info for name, info in source.infos().items() if not name.endswith(TRAINING_ONLY)}
    shapes = expected_shapes(config.model, config.router)
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith(TRAINING_ONLY)}
    for name in sorted(there.keys() ^ shapes.keys()):
        flaw = "missing" if name in shapes else "no tensor of the model that config.yaml describes"
        raise UserError(f"{name} is {flaw}")
    for name, shape in shapes.items():
        if there[name].shape != shape:
            raise UserError(f"{name} is {list(there[name].shape)}, and config.yaml's is {list(shape)}")
    return {name: there[name] for name in shapes}


def _planned(
    family: Family, infos: dict[str, TensorInfo], dtype: ExportDtype
) -> tuple[dict[str, DiskTensor], dict[str, TensorInfo]]:
    """What is written of the tensors `infos`, by its name there."""
    tensors, planned = {}, {}
    for name, info in infos.items():
        kept = info.dtype if dtype is ExportDtype.stored else getattr(torch, dtype.name)
        for part in family.on_disk(name, info.shape):
            tensors[part.name], planned[part.name] = part, TensorInfo(kept, part.shape)
    return tensors, planned


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
