"""How alike the experts of a layer are: by their weights, and by what they compute.

`weights`: cosine of two experts' parameters, all of them as one vector. The hidden units of an expert can be reordered
without changing what it computes, so this compares unit i with unit i: it finds what experts share since they started
from the same weights (upcycling, a copied expert) or were trained together on the same tokens; that it is near 0
doesn't say that two experts compute different things.

`outputs`: mean over tokens of the cosine of two experts' outputs for the same input, all experts run on the same tokens
of this text. Reordering hidden units doesn't change it.

Shapes: E experts, n tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.analysis.observe import SparseLayer, passes, sparse_layers
from moe.analysis.text import TextSequence
from moe.model.transformer import Transformer

SEQUENCES = 32  # the text's first ones
TOKENS = 256  # of them, evenly spread
TOKENS_AT_ONCE = 32  # × experts: rows that are computed together


@dataclass(slots=True)
class Similarity:
    """One layer's cosines between experts, each [E, E], and their means over different experts (NaN for one)."""

    layer: int
    tokens: int
    weights_EE: list[list[float]]
    outputs_EE: list[list[float]]
    mean_weights: float
    mean_outputs: float


def similarities(model: Transformer, sequences: list[TextSequence]) -> list[Similarity]:
    """Of every sparse layer, on the inputs that the layer gets in this text."""
    layers = sparse_layers(model)
    found = []
    for layer, x_nH in zip(layers, _inputs(model, layers, sequences[:SEQUENCES]), strict=True):
        weights_EE, outputs_EE = weight_cosines(layer), output_cosines(layer, x_nH)
        found.append(
            Similarity(
                layer=layer.number,
                tokens=len(x_nH),
                weights_EE=weights_EE.tolist(),
                outputs_EE=outputs_EE.tolist(),
                mean_weights=_mean_between(weights_EE),
                mean_outputs=_mean_between(outputs_EE),
            )
        )
    return found


@torch.no_grad()
def weight_cosines(layer: SparseLayer) -> Tensor:
    """[E, E]: Σ over parameters of the products, without a copy of all weights."""
    parameters = [parameter.flatten(1) for parameter in layer.mlp.experts.parameters()]
    products_EE = torch.stack([flat @ flat.T for flat in parameters]).sum(0).double()
    lengths_E = products_EE.diagonal().sqrt().clamp_min(1e-30)
    return products_EE / lengths_E[:, None] / lengths_E


@torch.no_grad()
def output_cosines(layer: SparseLayer, x_nH: Tensor) -> Tensor:
    """[E, E]: mean over tokens of the cosines of the experts' outputs; 0 where an output is 0."""
    experts = layer.mlp.experts
    count = experts.down_proj.shape[0]
    sums_EE = torch.zeros(count, count, dtype=torch.float64)
    for part_mH in x_nH.split(TOKENS_AT_ONCE):
        counts_E = torch.full((count,), len(part_mH))
        y_EmH = experts(part_mH.repeat(count, 1), counts_E).view(count, len(part_mH), -1)
        unit_mEH = F.normalize(y_EmH.double(), dim=-1, eps=1e-30).transpose(0, 1)
        sums_EE += (unit_mEH @ unit_mEH.transpose(1, 2)).sum(0)
    return sums_EE / len(x_nH)


def _inputs(model: Transformer, layers: list[SparseLayer], sequences: list[TextSequence]) -> list[Tensor]:
    """Each layer's inputs [n, H] at about `TOKENS` tokens, the same number in each sequence, evenly spaced."""
    each = max(1, TOKENS // len(sequences))
    kept: list[list[Tensor]] = [[] for _ in layers]

    def keep_into(parts: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_gate: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_BSH = args[0]
            places = torch.linspace(0, x_BSH.shape[1] - 1, min(each, x_BSH.shape[1])).long()
            parts.append(x_BSH[:, places].flatten(0, 1))

        return keep

    handles = [
        layer.gate.register_forward_pre_hook(keep_into(parts)) for layer, parts in zip(layers, kept, strict=True)
    ]
    try:
        for _ in passes(model, sequences):
            pass
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in kept]


def _mean_between(cosines_EE: Tensor) -> float:
    """The mean over pairs of different experts."""
    count = len(cosines_EE)
    return (
        float((cosines_EE.sum() - cosines_EE.diagonal().sum()) / (count * (count - 1))) if count > 1 else float("nan")
    )
