"""What an expert is worth: how much the loss rises when it is left out.

The router's choices of the expert are dropped, after it has made them. The weights of a token's other choices are
scaled so that their sum stays what it was; a token that had no other choice gets nothing from its layer's routed
experts. No other expert takes the tokens over, and the model isn't trained again: this measures what the trained model
relies on, not what it could learn without the expert.

The same sequences with and without the expert give paired differences, whose standard error is that of a ratio
estimator over sequences (`statistics.ratio`): Σ(loss without − loss with) / Σ targets, nats per token.

Shapes: B sequences, N choices of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moe.analysis.observe import Observed, SparseLayer, passes, sparse_layers
from moe.analysis.statistics import Estimate, ratio
from moe.analysis.text import TextSequence
from moe.model.transformer import Transformer
from moe.sparse.routers.base import Choices, RouterOutput


@dataclass(slots=True)
class Worth:
    """Nats per token that leaving one expert out adds, with its standard error over sequences; `by_source` likewise.

    `share` is the expert's share of the layer's choices in these sequences.
    """

    layer: int
    expert: int
    share: float
    rise: float
    error: float
    z: float
    by_source: dict[str, Estimate]


@dataclass(slots=True)
class LeaveOut:
    """`loss` is that of the whole model on these `sequences`, nats per token."""

    sequences: int
    tokens: int
    loss: float
    experts: list[Worth]


def affordable(sequences: list[TextSequence], num_experts: int, tokens: int) -> int:
    """How many of the sequences can pass once for each of `num_experts` experts within `tokens` tokens."""
    lengths_B = np.cumsum([len(sequence.input_ids_L) for sequence in sequences])
    return int((lengths_B * num_experts <= tokens).sum())


def leave_out(model: Transformer, sequences: list[TextSequence], observed: Observed) -> LeaveOut:
    """Every expert of every sparse layer, one at a time. `sequences` are the first of those that were `observed`."""
    count = len(sequences)
    nats_B, targets_B, sources_B = observed.nats_B[:count], observed.targets_B[:count], observed.sources_B[:count]
    tokens = sum(len(sequence.input_ids_L) for sequence in sequences)
    found = []
    for layer, choices in zip(sparse_layers(model), observed.layers, strict=True):
        taken_N = choices.experts_N[choices.tokens_N < tokens]
        for expert in range(choices.num_experts):
            without_B = np.zeros(count)
            with expert_left_out(layer, expert):
                for members, nats, _ in passes(model, sequences):
                    without_B[members] = nats
            rise_B = without_B - nats_B
            rise = ratio(rise_B, targets_B, sources_B)
            found.append(
                Worth(
                    layer=layer.number,
                    expert=expert,
                    share=float((taken_N == expert).mean()) if len(taken_N) else 0.0,
                    rise=rise.value,
                    error=rise.error,
                    z=rise.z,
                    by_source={
                        name: ratio(rise_B[sources_B == source], targets_B[sources_B == source])
                        for source, name in enumerate(observed.source_names)
                    },
                )
            )
    return LeaveOut(count, tokens, float(nats_B.sum() / targets_B.sum()), found)


@contextmanager
def expert_left_out(layer: SparseLayer, expert: int) -> Iterator[None]:
    """While it lasts, `expert` of this layer gets no token."""

    def drop(_gate: torch.nn.Module, _args: tuple[object, ...], routed: RouterOutput) -> RouterOutput:
        return replace(routed, choices=without(routed.choices, expert))

    handle = layer.gate.register_forward_hook(drop)
    try:
        yield
    finally:
        handle.remove()


def without(choices: Choices, expert: int) -> Choices:
    """The choices of all other experts, each token's weights scaled to the sum that they had."""
    before_T, after_T = _sums(choices), _sums(choices, choices.experts_N != expert)
    kept_N = (choices.experts_N != expert).nonzero().squeeze(1)
    tokens_N = choices.tokens_N[kept_N]
    scale_T = torch.where(after_T > 0, before_T / after_T.clamp_min(torch.finfo(after_T.dtype).tiny), 1.0)
    return Choices(
        tokens_N, choices.experts_N[kept_N], choices.weights_N[kept_N] * scale_T[tokens_N], choices.num_tokens
    )


def _sums(choices: Choices, mask_N: Tensor | None = None) -> Tensor:
    """Each token's sum of weights, of those that the mask keeps."""
    weights_N = choices.weights_N if mask_N is None else choices.weights_N * mask_N
    return weights_N.new_zeros(choices.num_tokens).index_add(0, choices.tokens_N, weights_N)
