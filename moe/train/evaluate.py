"""Evaluation on the held-out split: loss, bits per byte, unigram entropy, routers, experts, the routing of one text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.data.corpus import Corpus
from moe.data.loader import Batch, token_counts
from moe.distributed.mesh import Mesh
from moe.model.transformer import Transformer
from moe.sparse import RouterOutput, read_prefixes
from moe.train.held_out import LEFT_OUT, HeldOutRouting, loss_without_experts, oddity
from moe.train.metrics import bits_per_byte, entropy_nats

ROUTED_TOKENS = 400  # tokens of the text that the report colours by expert


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluation's metrics. For a sparse model also the routing of one held-out text, each layer's co-activation of
    experts [E, E], and the choices that the next evaluation is compared with."""

    metrics: dict[str, Any]
    routing: dict[str, Any] | None = None
    coactivation: list[list[list[float]]] | None = None
    choices: str = ""


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
        self, model: Transformer, begins: Callable[[str], None], number: int = 0, before: str = ""
    ) -> Evaluated:
        """The evaluation with this `number` of the run. A collective.

        `begins` is called with the name of each batch before it is computed. `before` are the last evaluation's
        choices. Routers that aren't causal are read causally; `val_loss_leaky` is the loss with training's routing.
        """
        model.eval()
        read_prefixes(model)
        device = self._mesh.device
        sums = torch.zeros(len(self._names), 2, dtype=torch.float64, device=device)  # [source, (nats, targets)]
        routing, held_out = None, HeldOutRouting(model, self._mesh)
        for index, batch in enumerate(self._batches):
            begins(f"evaluation batch {index + 1} of {len(self._batches)}")
            here = batch.to(device)
            output = model(here.input_ids_BS, **here.layout)
            loss_B = _loss_by_sequence(output.logits_BSV, here.labels_BS)
            pairs = torch.stack([loss_B, (here.labels_BS != -100).sum(-1).double()], dim=-1)
            sums.index_add_(0, here.source_ids_B, pairs)
            if output.routers:
                held_out.add(batch, output.routers)
            if index == 0 and output.routers:
                length = min(ROUTED_TOKENS, batch.input_ids_BS.shape[1])
                if batch.real_T is not None:
                    length = int((batch.real_T < length).sum())
                routing = {
                    "tokens": [self._tokenizer.piece(int(token)) for token in batch.input_ids_BS[0, :length]],
                    "experts": [_first_experts(router, length) for router in output.routers],
                    "num_experts": output.routers[0].counts_E.numel(),
                }
        held_out.close()
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
        coactivation, choices = None, ""
        if routing is not None:
            more, coactivation, choices = held_out.metrics(before)
            metrics |= more
            begins("evaluation without an expert")
            metrics["loss_without_expert"] = self._loss_without_experts(model, number, more["expert_output_norm"])
        read_prefixes(model, False)
        if not model.is_causal:
            begins("evaluation with the routing of training")
            metrics["val_loss_leaky"] = self._mean_loss(model)
        model.train()
        return Evaluated(metrics, routing, coactivation, choices)

    def _mean_loss(self, model: Transformer) -> float:
        """In nats per target, over all held-out sequences."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._mesh.device)  # (nats, targets)
        for batch in self._batches:
            here = batch.to(self._mesh.device)
            output = model(here.input_ids_BS, **here.layout)
            nats = _loss_by_sequence(output.logits_BSV, here.labels_BS).sum()
            sums += torch.stack((nats, (here.labels_BS != -100).sum().double()))
        nats, targets = self._mesh.sum_(sums).tolist()
        return nats / targets

    def _loss_without_experts(self, model: Transformer, number: int, norms: list[list[float]]) -> list[list[float]]:
        """[L][E] the first batch's loss without an expert less its loss with all, in nats per target; NaN for experts
        that weren't left out. Each evaluation leaves out LEFT_OUT experts: the one whose output norm differs most from
        its layer's median, then all in turn. A negative number: the loss is lower without the expert."""
        batch = self._batches[0].to(self._mesh.device)
        first_B = batch.sample_ids_B < len(batch.sample_ids_B)  # rank 0's, so that the number of ranks changes nothing

        def batch_loss() -> Tensor:
            output = model(batch.input_ids_BS, **batch.layout)
            nats_B, targets_B = _loss_by_sequence(output.logits_BSV, batch.labels_BS), (batch.labels_BS != -100).sum(-1)
            return torch.stack(((nats_B * first_B).sum(), (targets_B * first_B).sum().double()))

        places = [(layer, expert) for layer, row in enumerate(norms) for expert in range(len(row))]
        oddest = max(places, key=lambda place: oddity(norms[place[0]], place[1]))
        turns = [places[(number * (LEFT_OUT - 1) + turn) % len(places)] for turn in range(LEFT_OUT - 1)]
        left_out = list(dict.fromkeys([oddest, *turns]))
        losses = [batch_loss(), *loss_without_experts(model, batch_loss, left_out)]
        summed = self._mesh.sum_(torch.stack(losses)).cpu()
        nats = summed[:, 0] / summed[:, 1]
        found = [[math.nan] * len(row) for row in norms]
        for (layer, expert), loss in zip(left_out, nats[1:].tolist(), strict=True):
            found[layer][expert] = loss - float(nats[0])
        return found


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
