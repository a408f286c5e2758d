"""The layers of a model for one token of each text, in few operations: each computes as its module does in evaluation.

Weights are the module's own, but for q, k and v, which are joined; intermediate results stay in buffers that all layers
share. Where a token costs microseconds, an operation's fixed cost counts, whatever it computes.

Legend: B texts, H hidden, N query heads, G key/value heads, n = N/G, D head dimension, F feed-forward, E experts,
R rows (choices) sorted by expert, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import ModelConfig, QkNorm
from moe.kernels.rms_norm import rms_norm_reference
from moe.model.attention import Attention
from moe.model.block import Block
from moe.model.cache import OneMore
from moe.model.mlp import DenseMLP
from moe.model.norm import RMSNorm
from moe.sparse import SparseMLP


@dataclass(slots=True)
class Pass:
    """What all layers of one step share: the position's cos, and sin of each half of D; `mask_B11K`, which is added to
    scores, or None where every cached key is seen."""

    cos_1D: Tensor
    sins: tuple[Tensor, Tensor]
    slots: OneMore
    mask_B11K: Tensor | None


class Buffers:
    """The residual stream `x_BH` and the results that each layer overwrites, with the views of them that it needs."""

    def __init__(self, config: ModelConfig, batch: int, dtype: torch.dtype) -> None:
        query_heads, heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_size
        turned = query_heads + heads  # heads that are rotated: queries, then keys
        self.x_BH, self.normed_BH = (torch.empty(batch, config.hidden_size, dtype=dtype) for _ in range(2))
        self.qkv_BP = torch.empty(batch, (turned + heads) * dim, dtype=dtype)
        qkv = self.qkv_BP.view(batch, -1, dim)
        self.queries_P, self.keys_P = (
            self.qkv_BP[:, : query_heads * dim],
            self.qkv_BP[:, query_heads * dim : turned * dim],
        )
        self.plain, self.v_BGD = qkv[:, :turned], qkv[:, turned:]
        self.plain_halves = self.plain[..., : dim // 2], self.plain[..., dim // 2 :]
        self.rotated = torch.empty(batch, turned, dim, dtype=dtype)
        self.rotated_halves = self.rotated[..., : dim // 2], self.rotated[..., dim // 2 :]
        # The n queries of a group as n positions that read the same keys: no key is repeated.
        self.q_BGnD = self.rotated[:, :query_heads].view(batch, heads, query_heads // heads, dim)
        self.k_BGD = self.rotated[:, query_heads:]


class LeanNorm:
    """RMSNorm into a buffer."""

    def __init__(self, module: RMSNorm) -> None:
        self.weight_H, self.eps = module.weight.detach(), module.eps
        self.zero = torch.zeros_like(self.weight_H)

    def __call__(self, x_BH: Tensor, out_BH: Tensor) -> None:
        if len(x_BH) > 1 or x_BH.dtype is not torch.float32:
            out_BH.copy_(rms_norm_reference(x_BH, self.weight_H, self.eps))
            return
        x_H = x_BH[0]
        scale = (torch.dot(x_H, x_H).item() / len(x_H) + self.eps) ** -0.5
        torch.addcmul(self.zero, x_BH, self.weight_H, value=scale, out=out_BH)


class LeanAttention:
    def __init__(self, module: Attention) -> None:
        self.layer, self.qk_norm = module.layer, module.qk_norm
        if self.qk_norm is not QkNorm.none:
            self.q_norm, self.k_norm = LeanNorm(module.q_norm), LeanNorm(module.k_norm)  # type: ignore[arg-type]
        projections = (module.q_proj.weight, module.k_proj.weight, module.v_proj.weight)
        self.qkv_HP = torch.cat([weight.detach() for weight in projections]).t()
        self.out_PH = module.o_proj.weight.detach().t()

    def __call__(self, to: Buffers, now: Pass) -> None:
        """Adds attention's output for the normed tokens to the residual stream; writes their keys and values."""
        torch.mm(to.normed_BH, self.qkv_HP, out=to.qkv_BP)
        if self.qk_norm is not QkNorm.none:
            self._normed(to)
        torch.mul(to.plain, now.cos_1D, out=to.rotated)
        to.rotated_halves[0].addcmul_(to.plain_halves[1], now.sins[0])
        to.rotated_halves[1].addcmul_(to.plain_halves[0], now.sins[1])
        now.slots.new_keys[self.layer].copy_(to.k_BGD)
        now.slots.new_values[self.layer].copy_(to.v_BGD)
        keys, values = now.slots.keys[self.layer], now.slots.values[self.layer]
        y_BGnD = F.scaled_dot_product_attention(to.q_BGnD, keys, values, attn_mask=now.mask_B11K)
        to.x_BH.addmm_(y_BGnD.reshape(len(to.x_BH), -1), self.out_PH)

    def _normed(self, to: Buffers) -> None:
        q, k = to.queries_P, to.keys_P
        if self.qk_norm is QkNorm.head:
            q, k = (one.unflatten(1, (-1, to.rotated.shape[-1])) for one in (q, k))
        q.copy_(rms_norm_reference(q, self.q_norm.weight_H, self.q_norm.eps))
        k.copy_(rms_norm_reference(k, self.k_norm.weight_H, self.k_norm.eps))


class LeanMLP:
    """The dense block, and the experts that every token uses."""

    def __init__(self, module: DenseMLP) -> None:
        weights = module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight
        self.gate_HF, self.up_HF, self.down_FH = (weight.detach().t() for weight in weights)

    def __call__(self, to: Buffers) -> None:
        """Adds the block's output for the normed tokens to the residual stream."""
        act_BF = F.silu(torch.mm(to.normed_BH, self.gate_HF), inplace=True)
        to.x_BH.addmm_(act_BF.mul_(torch.mm(to.normed_BH, self.up_HF)), self.down_FH)


class LeanSparseMLP:
    def __init__(self, module: SparseMLP) -> None:
        self.router = module.gate
        self.gate_up_HF = [weight.t() for weight in module.experts.gate_up_proj.detach().unbind()]
        self.down_FH = [weight.t() for weight in module.experts.down_proj.detach().unbind()]
        self.width = len(self.down_FH[0])
        self.shared = None if module.shared_experts is None else LeanMLP(module.shared_experts)  # type: ignore[arg-type]

    def __call__(self, to: Buffers) -> None:
        """Adds the layer's output for the normed tokens to the residual stream."""
        choices = self.router.route(to.normed_BH)
        experts = choices.experts_N.tolist()
        if len(to.x_BH) == 1:
            self._one(to, experts, choices.weights_N.tolist())
        elif experts:
            self._many(to, experts, choices.tokens_N, choices.weights_N)
        if self.shared is not None:
            self.shared(to)

    def _one(self, to: Buffers, experts: list[int], weights: list[float]) -> None:
        for expert, weight in zip(experts, weights, strict=True):
            gate, up = torch.mm(to.normed_BH, self.gate_up_HF[expert]).split(self.width, 1)
            to.x_BH.addmm_(F.silu(gate, inplace=True).mul_(up), self.down_FH[expert], alpha=weight)

    def _many(self, to: Buffers, experts: list[int], tokens_R: Tensor, weights_R: Tensor) -> None:
        order = sorted(range(len(experts)), key=experts.__getitem__)
        counts = [0] * len(self.down_FH)
        for expert in experts:
            counts[expert] += 1
        order_R = torch.tensor(order)
        tokens_R = tokens_R[order_R]
        used = [expert for expert, count in enumerate(counts) if count]
        sizes = [counts[expert] for expert in used]
        x_RH = to.normed_BH[tokens_R]
        gate_up_RF, y_RH = x_RH.new_empty(len(order), 2 * self.width), torch.empty_like(x_RH)
        for expert, rows, out in zip(used, x_RH.split(sizes), gate_up_RF.split(sizes), strict=True):
            torch.mm(rows, self.gate_up_HF[expert], out=out)
        gate_RF, up_RF = gate_up_RF.split(self.width, 1)
        act_RF = F.silu(gate_RF, inplace=True).mul_(up_RF)
        for expert, rows, out in zip(used, act_RF.split(sizes), y_RH.split(sizes), strict=True):
            torch.mm(rows, self.down_FH[expert], out=out)
        weighted_RH = y_RH * weights_R[order_R][:, None]
        to.x_BH.copy_(to.x_BH.to(weighted_RH.dtype).index_add(0, tokens_R, weighted_RH))


class LeanBlock:
    def __init__(self, module: Block) -> None:
        self.input_norm = LeanNorm(module.input_layernorm)  # type: ignore[arg-type]
        self.attention = LeanAttention(module.self_attn)
        self.mlp_norm = LeanNorm(module.post_attention_layernorm)  # type: ignore[arg-type]
        self.mlp = LeanSparseMLP(module.mlp) if isinstance(module.mlp, SparseMLP) else LeanMLP(module.mlp)

    def __call__(self, to: Buffers, now: Pass) -> None:
        self.input_norm(to.x_BH, to.normed_BH)
        self.attention(to, now)
        self.mlp_norm(to.x_BH, to.normed_BH)
        self.mlp(to)
