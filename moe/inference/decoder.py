"""Logits token by token: the interface that generation uses, and the model's own forward pass behind it.

Legend: B texts, P longest prompt, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.model.cache import KVCache
from moe.model.transformer import Transformer


class Decoder:
    """The next token's logits for the B texts whose keys and values are in `cache`. The model is in evaluation mode.

    Prompts of different lengths are padded on the left; the padding is a document of its own, which no text sees.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache, self.padded = model, cache, False

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]], chunk: int, filler: int) -> Tensor:
        """Feeds the prompts, or what the cache doesn't hold of one, at most `chunk` tokens of each at once; the logits
        [B, V] that follow their last tokens. `filler` is any token's id."""
        width, device = max(map(len, prompts)), self.model.device
        self.padded = any(len(ids) < width for ids in prompts)
        ids_BP = torch.tensor([[filler] * (width - len(ids)) + ids for ids in prompts], device=device)
        documents_BP = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        logits_BV = None
        for ids_BC, documents_BC in zip(ids_BP.split(chunk, 1), documents_BP.split(chunk, 1), strict=True):
            logits_BV = self._logits(ids_BC, documents_BC)
        assert logits_BV is not None
        return logits_BV

    @torch.no_grad()
    def step(self, ids_B: list[int]) -> Tensor:
        """Appends a token to each text; the logits [B, V] that follow it."""
        ids_B1 = torch.tensor(ids_B, device=self.model.device)[:, None]
        return self._logits(ids_B1, torch.ones_like(ids_B1))

    def _logits(self, ids_BC: Tensor, documents_BC: Tensor) -> Tensor:
        documents = documents_BC if self.padded else None  # one document a text needs no mask
        output = self.model(ids_BC, document_ids_BS=documents, cache=self.cache, logits_to_keep=1)
        assert output.logits_BSV is not None
        return output.logits_BSV[:, -1]
