"""What the routers did with a text: every layer's choices, and each sequence's loss.

Shapes: T tokens of all sequences, one after the other; N choices of a layer, in token order; E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from moe.analysis.text import TextSequence, batches, stacked
from moe.model.loss import head_loss
from moe.model.transformer import Transformer
from moe.sparse import RouterOutput, SparseMLP, read_prefixes


@dataclass(slots=True)
class SparseLayer:
    """A sparse layer of the model and its number among all layers."""

    number: int
    mlp: SparseMLP

    @property
    def gate(self) -> nn.Module:
        return self.mlp.gate


def sparse_layers(model: Transformer) -> list[SparseLayer]:
    """The sparse layers in order; [] for a dense model."""
    return [
        SparseLayer(number, block.mlp)
        for number, block in enumerate(model.model.layers)
        if isinstance(block.mlp, SparseMLP)
    ]


@dataclass(slots=True)
class LayerChoices:
    """Which experts took which tokens in one layer. A token may have any number of experts, also none."""

    layer: int
    num_experts: int
    tokens_N: np.ndarray  # int64, not decreasing
    experts_N: np.ndarray  # int64, a token's best first
    weights_N: np.ndarray  # float32
    num_tokens: int

    @property
    def places_N(self) -> np.ndarray:
        """Each choice's place among its token's choices, 0 for the best."""
        starts_T = np.searchsorted(self.tokens_N, np.arange(self.num_tokens))
        return np.arange(len(self.tokens_N)) - starts_T[self.tokens_N]

    def first_T(self) -> np.ndarray:
        """int64 [T]: each token's best expert; −1 for a token that no expert took."""
        first_T = np.full(self.num_tokens, -1, np.int64)
        best_N = self.places_N == 0
        first_T[self.tokens_N[best_N]] = self.experts_N[best_N]
        return first_T

    def taken_TE(self, places: int | None = None) -> np.ndarray:
        """bool [T, E]: whether the expert is among a token's first `places` choices (None: all)."""
        taken_TE = np.zeros((self.num_tokens, self.num_experts), bool)
        kept_N = slice(None) if places is None else self.places_N < places
        taken_TE[self.tokens_N[kept_N], self.experts_N[kept_N]] = True
        return taken_TE

    @property
    def most_choices(self) -> int:
        """Of any one token."""
        return int(self.places_N.max(initial=-1)) + 1


@dataclass(slots=True)
class Observed:
    """The text's tokens and what became of them. A piece is the part of a document that is in one sequence."""

    ids_T: np.ndarray
    sequences_T: np.ndarray  # the number of each token's sequence
    pieces_T: np.ndarray  # the number of each token's piece, not decreasing
    positions_T: np.ndarray  # of a token in its piece, from 0
    sources_T: np.ndarray
    sources_B: np.ndarray  # of each sequence
    source_names: list[str]
    layers: list[LayerChoices]
    nats_B: np.ndarray  # float64, each sequence's summed loss
    targets_B: np.ndarray  # int64, the tokens it was summed over


def observe(model: Transformer, sequences: list[TextSequence], source_names: list[str]) -> Observed:
    """Routes the sequences; in eval mode, so nothing is dropped and no noise is added."""
    layers = sparse_layers(model)
    starts_B = np.concatenate([[0], np.cumsum([len(sequence.input_ids_L) for sequence in sequences])])
    nats_B = np.zeros(len(sequences))
    found: list[list[tuple[np.ndarray, ...]]] = [[] for _ in layers]
    num_experts = [0] * len(layers)
    for members, nats, routers in passes(model, sequences):
        nats_B[members] = nats
        length = len(sequences[members[0]].input_ids_L)
        tokens_T = (starts_B[members][:, None] + np.arange(length)).ravel()  # of the batch → of the whole text
        for index, routed in enumerate(routers):
            choices, num_experts[index] = routed.choices, routed.counts_E.numel()
            tokens_N = tokens_T[choices.tokens_N.numpy()]
            found[index].append((tokens_N, choices.experts_N.numpy(), choices.weights_N.float().numpy()))
    pieces_T, positions_T = _pieces(sequences)
    lengths_B = np.diff(starts_B)
    sources_B = np.array([sequence.source for sequence in sequences])
    return Observed(
        ids_T=np.concatenate([sequence.input_ids_L for sequence in sequences]),
        sequences_T=np.repeat(np.arange(len(sequences)), lengths_B),
        pieces_T=pieces_T,
        positions_T=positions_T,
        sources_T=np.repeat(sources_B, lengths_B),
        sources_B=sources_B,
        source_names=source_names,
        layers=[
            _joined(layer.number, experts, parts, int(starts_B[-1]))
            for layer, experts, parts in zip(layers, num_experts, found, strict=True)
        ],
        nats_B=nats_B,
        targets_B=np.array([sequence.targets for sequence in sequences]),
    )


@torch.no_grad()
def passes(
    model: Transformer, sequences: list[TextSequence]
) -> Iterator[tuple[list[int], np.ndarray, list[RouterOutput]]]:
    """(indices of the sequences, their summed losses in nats, the layers' router outputs) of each forward pass. Routers
    that aren't causal are read causally, as in training's evaluations."""
    read_prefixes(model)
    for members in batches(sequences):
        ids_BS, labels_BS, documents_BS = stacked([sequences[index] for index in members])
        x_BSH, routers = model.model(ids_BS, documents_BS, None, None)
        rows = zip(x_BSH, labels_BS, strict=True)
        yield members, np.array([_nats(model, x_SH, labels_S) for x_SH, labels_S in rows]), routers


def _nats(model: Transformer, x_SH: Tensor, labels_S: Tensor) -> float:
    return float(head_loss(model.lm_head, x_SH, labels_S, model.config.vocab_size))


def _joined(layer: int, num_experts: int, parts: list[tuple[np.ndarray, ...]], num_tokens: int) -> LayerChoices:
    """A layer's choices in the text's order: passes take sequences in another."""
    tokens_N, experts_N, weights_N = (np.concatenate(part) for part in zip(*parts, strict=True))
    order_N = np.argsort(tokens_N, kind="stable")
    return LayerChoices(layer, num_experts, tokens_N[order_N], experts_N[order_N], weights_N[order_N], num_tokens)


def _pieces(sequences: list[TextSequence]) -> tuple[np.ndarray, np.ndarray]:
    opens_T = np.concatenate([np.diff(one.document_ids_L, prepend=-1) != 0 for one in sequences])
    pieces_T = np.cumsum(opens_T) - 1
    return pieces_T, np.arange(len(opens_T)) - np.flatnonzero(opens_T)[pieces_T]
