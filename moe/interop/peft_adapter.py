"""An adapter's checkpoint as the package peft reads it: adapter_config.json and adapter_model.safetensors.

Names are those of peft 0.18 and later on transformers' model. Stacked experts are peft's `target_parameters`, whose A
[E·R, I] has rows in the order of experts and whose B [O, R·E] has columns in the order of ranks. Two on one module are
nested: `experts.base_layer` has the first.

Legend: E experts, R rank, I and O sizes before and after a product.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from moe.adapters.merge import adapted, is_part
from moe.config import Config
from moe.config.adapter import WITH_DROPOUT
from moe.durable import new_folder
from moe.errors import UserError
from moe.interop.tensor_files import TensorInfo, write_tensor_file
from moe.interop.tensor_source import CheckpointTensors

PREFIX = "base_model.model."
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
STACKED = {"gate_up_proj_lora": "experts.base_layer", "down_proj_lora": "experts"}  # our part → peft's module


def export_adapter(folder: Path, config: Config, base: Path, path: Path) -> str:
    """Writes the new folder `path`; says what was written. Raises UserError, OSError."""
    adapter, source = config.adapter, CheckpointTensors(folder)
    parts = [name for name in source.infos() if is_part(name)]
    others = any(adapted(name).split(".")[-2] not in WITH_DROPOUT for name in parts)
    for key, holds, reason in (
        ("modules_to_save", not adapter.modules_to_save, "peft has no place for parameters that trained in full here"),
        (
            "use_dora",
            not (adapter.use_dora and others),
            "peft has DoRA on all modules or none, and here attention alone has it",
        ),
    ):
        if not holds:
            raise UserError(f"format=peft: adapter.{key}={getattr(adapter, key)}: {reason}: leave format out, to merge")
    tensors = {name: tensor for part in parts for name, tensor in _as_peft(part, source.read(part))}
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(tensors.items())}
    with new_folder(path, "path") as partial:
        text = json.dumps(_peft_config(config, parts, source, base), indent=2) + "\n"
        (partial / CONFIG).write_text(text, encoding="utf-8")
        write_tensor_file(partial / TENSORS, infos, (tensors[name] for name in infos))
    return f"{path}: an adapter of {base}, {len(tensors):,} tensors"


def _as_peft(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    stem, _, part = name.rpartition(".")
    if part == "magnitude":
        yield f"{PREFIX}{stem}.lora_magnitude_vector", tensor
        return
    module, _, last = stem.rpartition(".")
    if last in STACKED:
        module = f"{module.removesuffix('.experts')}.{STACKED[last]}"
        tensor = tensor.flatten(0, 1) if part == "A" else tensor.permute(1, 2, 0).flatten(1)
    yield f"{PREFIX}{module}.lora_{part}.weight", tensor.contiguous()


def _peft_config(config: Config, parts: list[str], source: CheckpointTensors, base: Path) -> dict[str, Any]:
    """NOTE: with target_parameters peft refuses a dropout; it has no effect once training is over."""
    adapter, infos = config.adapter, source.infos()
    ranks = {name.removesuffix(".A"): infos[name].shape[-2] for name in parts if name.endswith(".A")}
    modules, parameters, pattern = set[str](), set[str](), dict[str, int]()
    for stem, rank in ranks.items():
        module, _, last = stem.rpartition(".")
        target = module
        if last in STACKED:
            target = f"{module}.{last.removesuffix('_lora')}"
            parameters.add(target)
        elif module.endswith(".gate"):
            target = f"{module}.weight"
            parameters.add(target)
        else:
            modules.add(module)
        if rank != adapter.r:
            pattern[target] = rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": adapter.r,
        "lora_alpha": adapter.lora_alpha,
        "lora_dropout": 0.0 if parameters else adapter.lora_dropout,
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "bias": "none",
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "rank_pattern": pattern,
    }
