"""A model's tensors under our names, read one at a time: of a checkpoint, a Hugging Face folder, or what a
transformation makes of another source's.

Legend: E experts, F feed-forward, H hidden.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moe.adapters.merge import is_part, merged
from moe.checkpoint.base import find_base
from moe.checkpoint.layout import MODEL
from moe.checkpoint.manifest import read_manifest, shards_of
from moe.checkpoint.state import read_state
from moe.config import AdapterConfig, Config, ExpertsConfig, ModelConfig, RouterConfig
from moe.errors import UserError
from moe.interop.tensor_files import StoredTensor, TensorInfo, read_header
from moe.model.transformer import Transformer

STACKED = (".experts.gate_up_proj", ".experts.down_proj")  # ends of the names of tensors whose first dimension is E
SHARDING = "DCP_SHARDING_INFO"  # a file's metadata: where the slices that it holds lie in their tensors


class TensorSource(Protocol):
    """Tensors by name. A transformation is a class that holds another source, and whose `read` changes what that one
    gives: merging an adapter changes values, upcycling makes experts of a dense MLP."""

    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor's dtype and shape, in the model's order; no tensor is read."""
        ...

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """One tensor; of a stacked one (`is_stacked`), with `expert`, that expert's slice without the first dimension.
        Raises UserError, OSError."""
        ...


def is_stacked(name: str) -> bool:
    """Whether the tensor's first dimension is the experts'."""
    return name.endswith(STACKED)


def pieces(source: TensorSource, name: str, info: TensorInfo) -> Iterator[Tensor]:
    """The tensor in consecutive pieces: stacked ones expert by expert, so that memory holds one expert."""
    if is_stacked(name):
        yield from (source.read(name, expert) for expert in range(info.shape[0]))
    else:
        yield source.read(name)


def expected_shapes(config: ModelConfig, router: RouterConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a model's parameters and persistent buffers, a tied one under its first name."""
    with torch.device("meta"):
        model = Transformer(config, router, ExpertsConfig())
    persistent = model.state_dict().keys()
    tensors = dict(model.named_parameters())
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


class CheckpointTensors:
    """The model of a checkpoint that `moe.checkpoint.reader.resolve` has verified."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers of the files that the manifest lists. Raises UserError, OSError."""
        self._slices: dict[str, list[tuple[int, StoredTensor]]] = {}  # (first row, where it lies), in order
        for name in shards_of(read_manifest(folder), MODEL):
            tensors, metadata = read_header(folder / name)
            first = _first_rows(folder / name, metadata)
            for key, stored in tensors.items():
                self._slices.setdefault(key, []).append((first.get(key, 0), stored))
        for parts in self._slices.values():
            parts.sort(key=lambda part: part[0])

    def flaw(self) -> str | None:
        """What keeps the files from holding each tensor exactly once."""
        for name, parts in self._slices.items():
            end, (_, one) = 0, parts[0]
            for first, stored in parts:
                if first != end or stored.dtype != one.dtype or stored.shape[1:] != one.shape[1:]:
                    return f"{name} lacks rows or has some twice, at {min(first, end)}"
                end += stored.shape[0] if stored.shape else 1
        return None

    def infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(parts[0][1].dtype, _whole(parts)) for name, parts in self._slices.items()}

    def read(self, name: str, expert: int | None = None) -> Tensor:
        parts = self._slices[name]
        if expert is not None:
            first, stored = next(part for part in reversed(parts) if part[0] <= expert)
            return stored.read(expert - first, 1)[0]
        if len(parts) == 1:
            return parts[0][1].read()
        whole = torch.empty(_whole(parts), dtype=parts[0][1].dtype)
        for first, stored in parts:
            stored.read_into(whole[first : first + stored.shape[0]])
        return whole


class MergedTensors:
    """The model of an adapter's checkpoint: its base's tensors with the adapter added, and those trained in full."""

    def __init__(self, base: TensorSource, trained: TensorSource, config: AdapterConfig) -> None:
        self._base, self._trained, self._config = base, trained, config
        saved = trained.infos()
        self._own = {name: info for name, info in saved.items() if not is_part(name)}
        self._parts = saved.keys() - self._own.keys()

    def infos(self) -> dict[str, TensorInfo]:
        return self._base.infos() | self._own

    def read(self, name: str, expert: int | None = None) -> Tensor:
        weight = (self._trained if name in self._own else self._base).read(name, expert)
        return merged(name, weight, self._parts, lambda part: self._trained.read(part, expert), self._config)


def open_checkpoint(folder: Path, config: Config) -> TensorSource:
    """The tensors of the whole model of a checkpoint that `resolve` has verified and `config` describes, an adapter
    merged. Raises UserError, OSError."""
    own = CheckpointTensors(folder)
    if not config.adapter.trains_adapter:
        return own
    return MergedTensors(CheckpointTensors(find_base(folder, read_state(folder))), own, config.adapter)


def header_flaw(folder: Path) -> str | None:
    """For `resolve`: the same as its own check, of headers that are read and not mapped into memory."""
    try:
        flaw = CheckpointTensors(folder).flaw()
    except UserError as error:
        return str(error)
    return None if flaw is None else f"{MODEL}: {flaw}"


def _whole(parts: list[tuple[int, StoredTensor]]) -> tuple[int, ...]:
    first, last = parts[-1]
    return (first + last.shape[0], *last.shape[1:]) if last.shape else ()


def _first_rows(path: Path, metadata: dict[str, Any]) -> dict[str, int]:
    """{tensor: the row of it that a file's slice begins at}."""
    try:
        stated = json.loads(metadata.get(SHARDING, "{}"))
        offsets = {name: one["saved_offsets"] for name, one in stated.items()}
        return {name: rows[0] if rows else 0 for name, rows in offsets.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: {SHARDING} of its header is unreadable: copy the checkpoint again") from error
