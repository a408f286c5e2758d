"""A base's tensors with a trained adapter merged into them, one tensor at a time."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from moe.adapters.merge import is_part, merged
from moe.checkpoint.base import find_base
from moe.checkpoint.state import read_state
from moe.config import AdapterConfig, Config
from moe.interop.tensor_files import TensorInfo
from moe.interop.tensor_source import CheckpointTensors, TensorSource


class MergedTensors:
    """A `TensorSource`. What the adapter's checkpoint has under a base's name was trained in full, or is a buffer."""

    def __init__(self, base: TensorSource, adapter: TensorSource, config: AdapterConfig) -> None:
        self._base, self._adapter, self._config = base, adapter, config
        self._own = adapter.infos()
        self._parts = {name for name in self._own if is_part(name)}

    def infos(self) -> dict[str, TensorInfo]:
        whole = {name: info for name, info in self._own.items() if name not in self._parts}
        return self._base.infos() | whole

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """Raises UserError where the adapter doesn't fit."""
        if name in self._own:
            return self._adapter.read(name, expert)

        def part(name: str) -> Tensor:
            tensor = self._adapter.read(name)
            return tensor if expert is None else tensor[expert]

        return merged(name, self._base.read(name, expert), self._parts, part, self._config)


def open_checkpoint(folder: Path, config: Config) -> TensorSource:
    """The tensors of the whole model of a checkpoint that `resolve` has verified and `config` describes, an adapter
    merged into its base. Raises UserError, OSError."""
    own = CheckpointTensors(folder)
    if not config.adapter.trains_adapter:
        return own
    return MergedTensors(CheckpointTensors(find_base(folder, read_state(folder))), own, config.adapter)
