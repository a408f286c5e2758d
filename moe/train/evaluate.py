"""Evaluation on the held-out split: loss, bits per byte, unigram entropy, and the routing of one text."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.data.corpus import Corpus
from moe.data.loader import Batch, token_counts
from moe.distributed.mesh import Mesh
from moe.model.transformer import Transformer
from moe.sparse import RouterOutput
from moe.train.metrics import bits_per_byte, entropy_nats

ROUTED_TOKENS = 400  # tokens of the text that the report colours by expert


class Evaluation:
    """Scores the same held-out sequences every time; unigram entropy and bytes are computed once. A collective."""

    def __init__(self, corpus: Corpus, batches: list[Batch], mesh: Mesh, vocab_size: int) -> None:
        self._tokenizer, self._names = corpus.tokenizer, corpus.source_names
        self._batches, self._mesh = batches, mesh
        counts_V = mesh.sum_(token_counts(batches, vocab_size).to(mesh.device, torch.float64)).cpu()
        self.unigram_entropy = entropy_nats(counts_V)
        lengths_V = torch.zeros(vocab_size, dtype=torch.float64)
        token_bytes = torch.from_numpy(self._tokenizer.token_bytes()).double()
        lengths_V[: len(token_bytes)] = token_bytes
        self._bytes = float(counts_V @ lengths_V)

    @torch.no_grad()
    def __call__(
        self, model: Transformer, begins: Callable[[str], None]
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """(metrics of the evaluation, routing of one held-out text or None for a dense model). A collective.

        `begins` is called with the name of each batch before it is computed.
        """
        model.eval()
        device = self._mesh.device
        sums = torch.zeros(len(self._names), 2, dtype=torch.float64, device=device)  # [source, (nats, targets)]
        routing = None
        for index, batch in enumerate(self._batches):
            begins(f"evaluation batch {index + 1} of {len(self._batches)}")
            here = batch.to(device)
            output = model(here.input_ids_BS, document_ids_BS=here.document_ids_BS)
            loss_B = _loss_by_sequence(output.logits_BSV, here.labels_BS)
            pairs = torch.stack([loss_B, (here.labels_BS != -100).sum(-1).double()], dim=-1)
            sums.index_add_(0, here.source_ids_B, pairs)
            if index == 0 and output.routers:
                length = min(ROUTED_TOKENS, batch.input_ids_BS.shape[1])
                routing = {
                    "tokens": [self._tokenizer.piece(int(token)) for token in batch.input_ids_BS[0, :length]],
                    "experts": [_first_experts(router, length) for router in output.routers],
                    "num_experts": output.routers[0].counts_E.numel(),
                }
        model.train()
        sums = self._mesh.sum_(sums).cpu()
        nats, targets = sums.sum(0).tolist()
        metrics = {
            "val_loss": nats / targets,
            "val_bits_per_byte": bits_per_byte(nats, self._bytes),
            "val_unigram_entropy": self.unigram_entropy,
            "val_loss_by_source": {
                name: loss / count for name, (loss, count) in zip(self._names, sums.tolist(), strict=True) if count
            },
        }
        return metrics, routing


def _first_experts(router: RouterOutput, tokens: int) -> list[int | None]:
    """The best expert of each of the first tokens; None for a token that no expert took."""
    tokens_N, experts = router.choices.tokens_N.cpu(), router.choices.experts_N.tolist()
    starts = torch.searchsorted(tokens_N, torch.arange(tokens + 1)).tolist()
    return [experts[start] if start < end else None for start, end in pairwise(starts)]


def _loss_by_sequence(logits_BSV: Tensor | None, labels_BS: Tensor) -> Tensor:
    """[B] float64: each sequence's summed cross-entropy in nats, computed one sequence at a time to bound memory."""
    assert logits_BSV is not None
    return torch.stack(
        [
            F.cross_entropy(logits_SV.float(), labels_S, ignore_index=-100, reduction="sum").double()
            for logits_SV, labels_S in zip(logits_BSV, labels_BS, strict=True)
        ]
    )
