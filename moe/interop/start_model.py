"""The model that a run starts from, where no checkpoint has its tensors as they are needed: a Hugging Face folder, an
adapter to be merged into its base, a vocabulary that gets more tokens.

Legend: V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moe.checkpoint.layout import CONFIG
from moe.checkpoint.reader import tokenizer_folder
from moe.config import Config
from moe.config.compose import read_config
from moe.data.added_tokens import with_special_tokens
from moe.data.tokenizer import load_saved
from moe.data.tokenizer_base import Tokenizer
from moe.interop.hub_folder import is_hub_folder
from moe.interop.importing import model_config, open_hub_folder
from moe.interop.model_folder import write_model_folder
from moe.interop.tensor_files import TensorInfo
from moe.interop.tensor_source import TensorSource, open_checkpoint

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")  # [V, H]


def must_be_written(path: Path, add_special_tokens: Sequence[str]) -> bool:
    """Whether a run can't read its first weights from `path`, a Hugging Face folder or a whole checkpoint, as they are.
    Raises UserError."""
    if is_hub_folder(path):
        return True
    saved: Config = read_config(path / CONFIG)
    tokenizer = load_saved(tokenizer_folder(path))
    return saved.adapter.trains_adapter or with_special_tokens(tokenizer, add_special_tokens) is not tokenizer


def write_start_model(path: Path, destination: Path, add_special_tokens: Sequence[str], vocab_size: int) -> None:
    """Writes the checkpoint `destination`: the whole model of `path`, with `vocab_size` rows if tokens are added to its
    tokenizer. Raises UserError, OSError; nothing is left half-done."""
    source, config, tokenizer = _opened(path, destination)
    added = with_special_tokens(tokenizer, add_special_tokens)
    if added is not tokenizer:
        source = WithAddedRows(source, tokenizer.vocab_size, added.vocab_size, vocab_size)
        config = replace(config, model=replace(config.model, vocab_size=vocab_size))
    write_model_folder(destination, source, added, config)


def _opened(path: Path, destination: Path) -> tuple[TensorSource, Config, Tokenizer]:
    if is_hub_folder(path):
        hub, tokenizer = open_hub_folder(path)
        return hub, model_config(hub.model, hub.router, destination), tokenizer
    saved: Config = read_config(path / CONFIG)
    config = model_config(saved.model, saved.router, destination)
    return open_checkpoint(path, saved), config, load_saved(tokenizer_folder(path))


class WithAddedRows:
    """A model whose embedding and head have `rows` rows. Those of new tokens, `first` to `end` − 1, are the mean of the
    rows before them, so that the new tokens' logits are of the others' size (Hewitt 2021, "Initializing New Word
    Embeddings for Pretrained Language Models"); so are rows behind the last of the source."""

    def __init__(self, source: TensorSource, first: int, end: int, rows: int) -> None:
        self._source, self._first, self._end, self._rows = source, first, end, rows

    def infos(self) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(info.dtype, (self._rows, info.shape[1])) if name in VOCABULARY else info
            for name, info in self._source.infos().items()
        }

    def read(self, name: str, expert: int | None = None) -> Tensor:
        tensor = self._source.read(name, expert)
        if name not in VOCABULARY:
            return tensor
        mean_H = tensor[: self._first].mean(0, dtype=torch.float64).to(tensor.dtype)
        rows_VH = mean_H.repeat(self._rows, 1)
        rows_VH[: self._first] = tensor[: self._first]
        rows_VH[self._end : len(tensor)] = tensor[self._end :]
        return rows_VH
