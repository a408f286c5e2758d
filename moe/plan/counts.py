"""Parameters of a model, from its configuration alone.

Legend: S sequence, H hidden, F feed-forward, L layers, N query heads, G key/value heads, D head dimension, E experts,
k choices per token, V vocabulary, W window.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.config import Config, ModelConfig, QkNorm


def count_parameters(config: Config) -> tuple[int, int]:
    """(total, active) parameters of the whole model, for any number of ranks.

    Active are those that one token's forward pass uses: k of the E experts, and everything else.
    """
    parts = parameter_parts(config)
    return parts.shared + parts.experts, parts.shared + parts.active_experts


@dataclass(frozen=True, slots=True)
class ParameterParts:
    shared: int  # all but the experts: embedding, head, attention, norms, routers, dense MLPs, shared experts
    experts: int  # all experts of all layers that a router chooses from; 0 for a dense model
    active_experts: int  # those that one token uses
    embedding: int  # the input embedding; part of `shared`
    norms: int  # part of `shared`


def parameter_parts(config: Config) -> ParameterParts:
    model, router = config.model, config.router
    hidden, layers = model.hidden_size, model.num_hidden_layers
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads  # q and o, k and v
    embedding = model.vocab_size * hidden
    norms = (2 * layers + 1) * hidden + layers * _qk_norm_weights(model)
    sparse_layers = model.sparse_layer_numbers
    expert, dense = 3 * hidden * model.expert_size, 3 * hidden * model.intermediate_size
    shared = (1 if model.tie_word_embeddings else 2) * embedding + norms + layers * heads * model.head_size * hidden
    shared += (layers - len(sparse_layers)) * dense
    shared += len(sparse_layers) * (router.num_parameters(hidden) + model.n_shared_experts * expert)
    return ParameterParts(
        shared=shared,
        experts=len(sparse_layers) * router.num_experts * expert,
        active_experts=router.choices_in(sparse_layers) * expert,
        embedding=embedding,
        norms=norms,
    )


def _qk_norm_weights(model: ModelConfig) -> int:
    """Of one layer's norms of queries and keys."""
    if model.qk_norm is QkNorm.none:
        return 0
    heads = 2 if model.qk_norm is QkNorm.head else model.num_attention_heads + model.num_key_value_heads
    return heads * model.head_size


def visible_keys(sequence_length: int, window: int | None) -> float:
    """Mean number of keys that a query sees, its own included: (S + 1) / 2; with a window W < S, W − W(W − 1) / 2S."""
    width = sequence_length if window is None else min(window, sequence_length)
    return width - width * (width - 1) / (2 * sequence_length)
