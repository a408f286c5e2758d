"""One layer of the decoder: attention, then a dense or sparse MLP, each after a norm and with a residual connection.

Legend: B batch, S sequence, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moe.config import ExpertsConfig, ModelConfig, Recompute, RouterConfig
from moe.kernels.policy import recomputed
from moe.model.attention import Attention
from moe.model.context import AFTER_ATTENTION, AFTER_MLP, ROUTER, Context
from moe.model.mlp import DenseMLP
from moe.model.norm import build_norm
from moe.sparse import Dispatched, RouterOutput, SparseMLP, build_sparse_mlp

Pending = Callable[[], Tensor]  # half of a batch, [B, S, H]: waits for it where it is still on its way


def given(x_BSH: Tensor) -> Tensor:
    return x_BSH


class Block(nn.Module):
    def __init__(
        self,
        layer: int,
        model: ModelConfig,
        router: RouterConfig,
        experts: ExpertsConfig,
        expert_group: ProcessGroup | None,
    ) -> None:
        super().__init__()
        hidden = model.hidden_size
        self.input_layernorm = build_norm(model, hidden)
        self.self_attn = Attention(model, layer, model.sliding_window)
        self.post_attention_layernorm = build_norm(model, hidden)
        self.mlp: SparseMLP | DenseMLP
        if layer in model.sparse_layer_numbers:
            self.mlp = build_sparse_mlp(
                hidden,
                model.expert_size,
                router.for_layer(layer),
                experts,
                expert_group=expert_group,
                shared_experts=DenseMLP(hidden, model.shared_size) if model.shared_size else None,
            )
        else:
            self.mlp = DenseMLP(hidden, model.intermediate_size)
        self.layer, self.recompute, self.dropout = layer, model.recompute, model.hidden_dropout

    def forward(self, x_BSH: Tensor, context: Context) -> tuple[Tensor, RouterOutput | None]:
        if self.recompute is Recompute.block:
            return recomputed(self._whole, x_BSH, context)
        return self._whole(x_BSH, context)

    def _whole(self, x_BSH: Tensor, context: Context) -> tuple[Tensor, RouterOutput | None]:
        x_BSH = x_BSH + self._attention(x_BSH, context)
        if self.recompute is Recompute.mlp:
            y_BSH, routed = recomputed(self._feed_forward, x_BSH, context)
        else:
            y_BSH, routed = self._feed_forward(x_BSH, context)
        return x_BSH + y_BSH, routed

    def forward_in_halves(
        self, halves: list[Pending], contexts: list[Context], whole: Context
    ) -> tuple[list[Pending], RouterOutput | None]:
        """`forward` of the two halves of a batch, of which one's rows travel between ranks while the other's attention
        or experts are computed (two-batch overlap). Returns before the last results have arrived: calling a `Pending`
        waits for its half's. Takes the `halves` out of their list, so that what they hold is freed.
        """
        if self.recompute is Recompute.block:
            inputs = [halves.pop(0)() for _ in contexts]
            done, routed = recomputed(self._arrived_halves, inputs, contexts, whole)
            return [partial(given, x_BSH) for x_BSH in done], routed
        return self._halves(halves, contexts, whole)

    def _arrived_halves(
        self, inputs: list[Tensor], contexts: list[Context], whole: Context
    ) -> tuple[list[Tensor], RouterOutput | None]:
        halves, routed = self._halves([partial(given, x_BSH) for x_BSH in inputs], contexts, whole)
        return [half() for half in halves], routed

    def _halves(
        self, halves: list[Pending], contexts: list[Context], whole: Context
    ) -> tuple[list[Pending], RouterOutput | None]:
        attended, normed, dispatched = [], [], []
        for context in contexts:
            x_BSH = halves.pop(0)()
            attended.append(x_BSH + self._attention(x_BSH, context))
            normed.append(self.post_attention_layernorm(attended[-1]))
            if isinstance(self.mlp, SparseMLP):
                randomness = context.randomness_at(self.layer, ROUTER)
                dispatched.append(self.mlp.dispatch(normed[-1], randomness, context.real))
        if not isinstance(self.mlp, SparseMLP):
            each = zip(attended, normed, contexts, strict=True)
            return [partial(given, x + self._dropped(self.mlp(y), context, AFTER_MLP)) for x, y, context in each], None
        # losses and metrics are those of the whole micro-batch: its router runs once more, without dispatching
        routed = self.mlp.route(torch.cat(normed), whole.randomness_at(self.layer, ROUTER), whole.real)
        for one in dispatched:
            self.mlp.compute(one)
        parts = zip(attended, dispatched, contexts, strict=True)
        return [partial(self._combined, *part) for part in parts], routed

    def _combined(self, x_BSH: Tensor, dispatched: Dispatched, context: Context) -> Tensor:
        assert isinstance(self.mlp, SparseMLP)
        return x_BSH + self._dropped(self.mlp.combine(dispatched), context, AFTER_MLP)

    def _attention(self, x_BSH: Tensor, context: Context) -> Tensor:
        return self._dropped(self.self_attn(self.input_layernorm(x_BSH), context), context, AFTER_ATTENTION)

    def _feed_forward(self, x_BSH: Tensor, context: Context) -> tuple[Tensor, RouterOutput | None]:
        normed_BSH, routed = self.post_attention_layernorm(x_BSH), None
        if isinstance(self.mlp, SparseMLP):
            y_BSH, routed = self.mlp(normed_BSH, context.randomness_at(self.layer, ROUTER), context.real)
        else:
            y_BSH = self.mlp(normed_BSH)
        return self._dropped(y_BSH, context, AFTER_MLP), routed

    def _dropped(self, x_BSH: Tensor, context: Context, place: int) -> Tensor:
        if not (self.dropout and self.training):
            return x_BSH
        randomness = context.randomness_at(self.layer, place)
        if randomness is None:
            raise ValueError(f"model.hidden_dropout={self.dropout} needs the batch's randomness")
        return randomness.dropout(x_BSH, self.dropout)
