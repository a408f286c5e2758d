"""The decoder: Mistral with `model.mlp=dense`, Mixtral with `model.mlp=sparse` (arXiv 2310.06825, 2401.04088).

Parameter names are those of transformers 5's `MistralForCausalLM` and `MixtralForCausalLM`.
Legend: B batch, S sequence, H hidden, V vocabulary, N query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from moe.config import ExpertsConfig, Mlp, ModelConfig, Recompute, RouterConfig
from moe.model.attention import Attend, make_attend, resolve_attention
from moe.model.cache import KVCache
from moe.model.loss import linear_cross_entropy
from moe.model.mlp import DenseMLP
from moe.model.norm import RMSNorm
from moe.model.rope import RotaryTable, project_rotated, rotary_table
from moe.sparse import Experts, Randomness, RouterOutput, SparseMLP


@dataclass(slots=True)
class ModelOutput:
    logits_BSV: Tensor | None  # None when labels are given
    lm_loss_sum: Tensor | None  # float32 sum of cross-entropy over labels ≠ −100; None without labels
    routers: list[RouterOutput]  # one per sparse layer, in order; [] for a dense model


@dataclass(slots=True)
class Context:
    """What all layers of one forward pass share."""

    table: RotaryTable
    attend: Attend | None  # over the tokens of this pass; None when earlier ones are cached
    cache: KVCache | None
    randomness: Randomness | None = None


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        queries = config.num_attention_heads * config.head_size
        keys = config.num_key_value_heads * config.head_size
        self.layer = layer
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x_BSH: Tensor, context: Context) -> Tensor:
        weights = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        q_BSND, k_BSGD, v_BSGD = project_rotated(x_BSH, *weights, context.table)
        cache = context.cache
        if context.attend is None:
            assert cache is not None
            return self.o_proj(cache.attend(self.layer, q_BSND, k_BSGD, v_BSGD))
        if cache is not None:
            cache.write(self.layer, k_BSGD, v_BSGD)
        return self.o_proj(context.attend(q_BSND, k_BSGD, v_BSGD))


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
        hidden, intermediate = model.hidden_size, model.intermediate_size
        self.input_layernorm = RMSNorm(hidden, model.rms_norm_eps)
        self.self_attn = Attention(model, layer)
        self.post_attention_layernorm = RMSNorm(hidden, model.rms_norm_eps)
        self.mlp: SparseMLP | DenseMLP
        if model.mlp is Mlp.sparse:
            self.mlp = SparseMLP(hidden, intermediate, router, experts, expert_group=expert_group)
        else:
            self.mlp = DenseMLP(hidden, intermediate)
        self.layer, self.recompute, self.dropout = layer, model.recompute, model.hidden_dropout

    def forward(self, x_BSH: Tensor, context: Context) -> tuple[Tensor, RouterOutput | None]:
        if self.recompute is Recompute.block:
            return _recomputed(self._whole, x_BSH, context)
        return self._whole(x_BSH, context)

    def _whole(self, x_BSH: Tensor, context: Context) -> tuple[Tensor, RouterOutput | None]:
        x_BSH = x_BSH + self._attention(x_BSH, context)
        if self.recompute is Recompute.mlp:
            y_BSH, routed = _recomputed(self._feed_forward, x_BSH, context)
        else:
            y_BSH, routed = self._feed_forward(x_BSH, context)
        return x_BSH + y_BSH, routed

    def _attention(self, x_BSH: Tensor, context: Context) -> Tensor:
        return self._dropped(self.self_attn(self.input_layernorm(x_BSH), context), context, 0)

    def _feed_forward(self, x_BSH: Tensor, context: Context) -> tuple[Tensor, RouterOutput | None]:
        normed_BSH, routed = self.post_attention_layernorm(x_BSH), None
        if isinstance(self.mlp, SparseMLP):
            y_BSH, routed = self.mlp(normed_BSH, self._randomness(context, 1))
        else:
            y_BSH = self.mlp(normed_BSH)
        return self._dropped(y_BSH, context, 2), routed

    def _randomness(self, context: Context, place: int) -> Randomness | None:
        return None if context.randomness is None else context.randomness.fork(self.layer).fork(place)

    def _dropped(self, x_BSH: Tensor, context: Context, place: int) -> Tensor:
        if not (self.dropout and self.training):
            return x_BSH
        randomness = self._randomness(context, place)
        if randomness is None:
            raise ValueError(f"model.hidden_dropout={self.dropout} needs the batch's randomness")
        return randomness.dropout(x_BSH, self.dropout)


def _recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, whose backward pass runs it again, with the same numbers from `Randomness`.

    With expert parallelism the exchange runs again too: every rank's backward pass meets the blocks in the same order.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Decoder(nn.Module):
    """Everything but the head; a module of its own only because the parameter names say `model.`."""

    def __init__(
        self, model: ModelConfig, router: RouterConfig, experts: ExpertsConfig, expert_group: ProcessGroup | None
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(
            Block(layer, model, router, experts, expert_group) for layer in range(model.num_hidden_layers)
        )
        self.norm = RMSNorm(model.hidden_size, model.rms_norm_eps)

    def forward(self, input_ids_BS: Tensor, context: Context) -> tuple[Tensor, list[RouterOutput]]:
        x_BSH, routers = self.embed_tokens(input_ids_BS), []
        for block in self.layers:
            x_BSH, routed = block(x_BSH, context)
            if routed is not None:
                routers.append(routed)
        return self.norm(x_BSH), routers


class Transformer(nn.Module):
    """The language model. With an `expert_group` of N ranks each holds 1/N of every layer's experts.

    Weights are torch's defaults until `init_weights` or a checkpoint sets them. Raises ValueError, at the first forward
    pass, when `model.attention` names a back-end that can't run on the model's device and dtype.
    """

    def __init__(
        self,
        model: ModelConfig,
        router: RouterConfig,
        experts: ExpertsConfig,
        *,
        expert_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.config = model
        self.model = Decoder(model, router, experts, expert_group)
        self.lm_head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        if model.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """N(0, initializer_range), norms 1: a function of (seed, parameter name, global expert index) alone.

        So the same model starts at any number of ranks, any expert degree, on any device.
        """
        std = self.config.initializer_range
        for prefix, module in self.named_modules():
            if isinstance(module, Experts):
                module.reset_parameters(std, partial(_expert_seed, seed, prefix))
                continue
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if isinstance(module, RMSNorm):
                    parameter.fill_(1.0)
                elif not (self.config.tie_word_embeddings and module is self.lm_head):  # set as the embedding
                    generator = torch.Generator().manual_seed(_seed(seed, name))
                    parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))

    def forward(
        self,
        input_ids_BS: Tensor,
        *,
        document_ids_BS: Tensor | None = None,
        labels_BS: Tensor | None = None,
        cache: KVCache | None = None,
        randomness: Randomness | None = None,
    ) -> ModelOutput:
        """Logits, or the loss where labels (already shifted, −100 for no target) are given.

        `document_ids_BS` never falls along S; tokens see their own document only (None: one document). With a `cache`
        the tokens follow those of earlier calls; it is filled and moved on. Dropout and jitter, where configured, take
        their numbers from `randomness` in training.
        """
        config, (batch, count) = self.config, input_ids_BS.shape
        weight = self.model.embed_tokens.weight
        device, dtype = weight.device, weight.dtype
        start = 0 if cache is None else cache.length
        if cache is not None:
            cache.begin(count, document_ids_BS)
        attend = None
        if start == 0:
            backend, _ = resolve_attention(config.attention, device, dtype, config.head_size)
            attend = make_attend(backend, (batch, count), config.sliding_window, document_ids_BS, device)
        table = rotary_table(start, count, config.head_size, config.rope_theta, device, dtype)
        x_BSH, routers = self.model(input_ids_BS, Context(table, attend, cache, randomness))
        if cache is not None:
            cache.commit()
        if labels_BS is None:
            return ModelOutput(self.lm_head(x_BSH), None, routers)
        loss = linear_cross_entropy(x_BSH.flatten(0, 1), self.lm_head.weight, labels_BS.flatten())
        return ModelOutput(None, loss, routers)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little", signed=True)


def _expert_seed(seed: int, prefix: str, name: str, expert: int) -> int:
    return _seed(seed, f"{prefix}.{name}/{expert}")
