"""Writes a model-only checkpoint folder (`moe.checkpoint.layout`) from a source of tensors, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from moe.checkpoint.files import SavedTokenizer, small_files, write_small_files
from moe.checkpoint.layout import MODEL, UNTRAINED
from moe.checkpoint.ownership import FILE_BYTES, file_numbers
from moe.checkpoint.state import TrainState
from moe.config import Config
from moe.config.compose import to_yaml
from moe.durable import new_folder
from moe.interop.tensor_files import TensorInfo, write_tensor_file
from moe.interop.tensor_source import TensorSource, pieces


def write_model_folder(
    folder: Path, source: TensorSource, tokenizer: SavedTokenizer, config: Config, state: TrainState | None = None
) -> None:
    """As `moe.checkpoint.model_writer.write_model`, of tensors that are read one at a time; they keep their dtypes.

    Memory holds one tensor, of stacked experts one expert. Raises UserError when `folder` exists, OSError.
    """
    state = replace(state or TrainState(), tokenizer=tokenizer.fingerprint)
    infos = source.infos()
    with new_folder(folder, "run_dir") as partial:
        (partial / MODEL).mkdir()
        manifest = {}
        for name, tensors in in_files(infos).items():
            data = _data(source, tensors)
            manifest[f"{MODEL}/{name}"] = write_tensor_file(partial / MODEL / name, tensors, data)
        write_small_files(partial, small_files(state, to_yaml(config), tokenizer), manifest)


def _data(source: TensorSource, tensors: dict[str, TensorInfo]) -> Iterator[Tensor]:
    for name, info in tensors.items():
        yield from pieces(source, name, info)


def in_files(infos: dict[str, TensorInfo], file_bytes: int = FILE_BYTES) -> dict[str, dict[str, TensorInfo]]:
    """{file name: its tensors}, about `file_bytes` in each file, under transformers' names."""
    numbers = file_numbers({(UNTRAINED, name): info.nbytes for name, info in infos.items()}, file_bytes)
    count = max(numbers.values())
    files: dict[str, dict[str, TensorInfo]] = {}
    for name, number in numbers.items():
        file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        files.setdefault(file, {})[name] = infos[name]
    return files
