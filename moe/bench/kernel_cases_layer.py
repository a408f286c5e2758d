"""The whole sparse layer (router, dispatch, experts, combine) beside transformers' block and DeepSpeed's MoE layer, for
`moe bench kernels` and `moe bench peers`. The routers' balance losses are computed and not compared.

Legend: B batch, S sequence, T = B·S tokens, K choices of a token, H hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe.bench.kernel_case import Case, Side
from moe.sparse.balance import max_violation
from moe.sparse.layer import SparseMLP

DEEPSPEED = "DeepSpeed's MoE"


def layer_cases(layer: SparseMLP, blocks: Mapping[str, Any], x_BSH: Tensor) -> Iterator[Case]:
    """With the routing of random tokens x and with that of tokens made for it, which give each expert as many rows.
    `blocks` are transformers' with the layer's weights."""
    from moe.engine.deepspeed.own_layer import DeepSpeedLayer  # here, since importing DeepSpeed takes seconds

    gate: Any = layer.gate
    deepspeed, top_k, experts = DeepSpeedLayer(layer), gate.config.top_k, layer.experts
    weights = [gate.weight, experts.gate_up_proj, experts.down_proj]
    per_row = sum(weight[0].numel() for weight in weights[1:])
    tokens = x_BSH.shape[0] * x_BSH.shape[1]
    flops = 6.0 * tokens * (top_k * per_row + gate.weight.numel())
    for routing, input_BSH in (("own", x_BSH), ("uniform", evenly_routed(x_BSH, gate.weight, top_k))):
        leaf_BSH = input_BSH.detach().requires_grad_()
        sides = {"ours": _ours(layer, leaf_BSH, weights)}
        sides |= {name: _transformers(block, leaf_BSH) for name, block in blocks.items()}
        sides[DEEPSPEED] = _deepspeeds(deepspeed, leaf_BSH)
        with torch.no_grad():
            violation = float(max_violation(gate(leaf_BSH).counts_E))
        yield Case(f"sparse layer, {routing} routing", sides, flops=flops, max_violation=violation)


def evenly_routed(x_BSH: Tensor, weight_EH: Tensor, top_k: int) -> Tensor:
    """x changed along the router's weights only, so that the logits of K experts are about 1 and the others' 0, and
    each expert is chosen equally often. Exact where the E rows of the router's weight are linearly independent."""
    experts, hidden = weight_EH.shape
    x_TH, weight_EH = x_BSH.detach().reshape(-1, hidden).float(), weight_EH.detach().float()
    chosen_TK = torch.arange(len(x_TH) * top_k).view(-1, top_k) % experts
    # The first choice's logit is the largest, so that rounding can't exchange the two.
    logits_TK = torch.linspace(1.2, 1.0, top_k).expand(chosen_TK.shape)
    logits_TE = torch.zeros(len(x_TH), experts).scatter(1, chosen_TK, logits_TK)
    moved_TH = x_TH + (logits_TE - x_TH @ weight_EH.T) @ torch.linalg.pinv(weight_EH).T
    return moved_TH.view(x_BSH.shape).to(x_BSH.dtype)


def _ours(layer: SparseMLP, x_BSH: Tensor, weights: list[Tensor]) -> Side:
    return Side(lambda: [layer(x_BSH)[0]], [x_BSH, *weights])


def _transformers(block: Any, x_BSH: Tensor) -> Side:
    leaves = [x_BSH, block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj]
    return Side(lambda: [block(x_BSH)], leaves)


def _deepspeeds(layer: Any, x_BSH: Tensor) -> Side:
    def as_ours(gradients: Sequence[Tensor]) -> list[Tensor]:
        return [gradients[0], *layer.stacked(gradients[1:])]

    return Side(lambda: [layer(x_BSH)], [x_BSH, *layer.weights], as_ours)
