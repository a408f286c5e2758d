"""FLOPs of a token in training: forward, and backward as far as something trains.

A product with n weights is 2·n FLOPs forward (a multiply-add is 2), 2·n for the gradient of its weights, unless they
are frozen, and 2·n for the gradient of its input, unless nothing before it trains. The backward pass of attention's
scores is whole or none. Counts only what the mathematics needs: one document per sequence, no dropped choices, no
masked scores, no recomputation, and no norms or softmax.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from moe.config import Config
from moe.plan.counts import parameter_parts, visible_keys
from moe.plan.trained import EXPERTS, adapter_shapes, parameter_shapes, trained_shapes, trains_all

# Where in a block a module reads and writes, in the order of the forward pass. The scores read at SCORES.
PLACES = {
    "input_layernorm": (0, 1),
    "q_proj": (1, 2),
    "k_proj": (1, 2),
    "v_proj": (1, 2),
    "q_norm": (2, 3),
    "k_norm": (2, 3),
    "o_proj": (3, 4),
    "post_attention_layernorm": (4, 5),
    "gate": (5, 7),
    "gate_proj": (5, 6),
    "up_proj": (5, 6),
    "gate_up_proj": (5, 6),
    "down_proj": (6, 7),
}
SCORES, BLOCK = 3, 8
PARTS = ("experts", "mlp", "attention", "router", "head")  # `mlp`: dense ones and shared experts


@dataclass(slots=True)
class PartFlops:
    """Of one token in one kind of products."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward


def flops_per_token(config: Config) -> float:
    """Training FLOPs of one token. Where everything trains: 6 · (active weights that are multiplied) + 12 · L · N · D ·
    (mean visible keys) for L layers of N heads with D dimensions."""
    return sum(part.total for part in flops_by_part(config).values())


def counts_first(config: Config) -> bool:
    """Whether each step first runs the model on its whole batch without gradients, to count the routers' choices."""
    routers = [config.router, *(config.router.for_layer(layer) for layer in config.router.layers)]
    return bool(config.model.sparse_layer_numbers) and any(
        hasattr(router, "global_aux_loss_coef") and router.highest("global_aux_loss_coef") > 0 for router in routers
    )


def flops_by_part(config: Config) -> dict[str, PartFlops]:
    """{a name of PARTS: its FLOPs}."""
    if trains_all(config):
        return {name: PartFlops(forward, 2 * forward) for name, forward in _forward(config).items()}
    return _of_what_trains(config)


def _forward(config: Config) -> dict[str, float]:
    model, parts = config.model, parameter_parts(config)
    layers, sparse = model.num_hidden_layers, len(model.sparse_layer_numbers)
    heads = 2 * (model.num_attention_heads + model.num_key_value_heads) * model.head_size
    width = (layers - sparse) * model.intermediate_size + sparse * model.shared_size
    return {
        "experts": 2.0 * parts.active_experts,
        "mlp": 2.0 * 3 * model.hidden_size * width,
        "attention": 2.0 * layers * heads * model.hidden_size + layers * _scores(config),
        "router": 2.0 * sparse * config.router.num_parameters(model.hidden_size),
        "head": 2.0 * parts.embedding,
    }


def _scores(config: Config) -> float:
    """Of one layer's attention, forward: the products with keys and with values."""
    model = config.model
    keys = visible_keys(config.train.sequence_length, model.sliding_window)
    return 4 * model.num_attention_heads * model.head_size * keys


def _of_what_trains(config: Config) -> dict[str, PartFlops]:
    trained, parts = trained_shapes(config), {name: PartFlops() for name in PARTS}
    first = min((_place(name, config)[1] for name in trained), default=math.inf)
    for layer in range(config.model.num_hidden_layers):
        scores = _scores(config)
        parts["attention"].forward += scores
        parts["attention"].backward += 2 * scores * (first <= BLOCK * (layer + 1) + SCORES)
    for name, weights in _products(config):
        part, reads = parts[_part(name)], _place(name, config)[0]
        # B reads what A writes.
        behind_trained = first <= reads or (name.endswith("lora.B") and f"{name.removesuffix('B')}A" in trained)
        part.forward += 2 * weights
        part.backward += 2 * weights * ((name in trained) + behind_trained)
    return parts


def _products(config: Config) -> Iterator[tuple[str, float]]:
    """(name, weights that a token is multiplied with) of every matrix, adapters included."""
    everything = parameter_shapes(config)
    tied = config.model.tie_word_embeddings
    for name, shape in (everything | adapter_shapes(config, everything)).items():
        if len(shape) < 2 or ("embed_tokens" in name and not tied):
            continue
        share = 1.0
        if len(shape) == 3:
            share = config.router.choices_in([int(name.split(".")[2])]) / shape[0]
        yield name, share * math.prod(shape)


def _place(name: str, config: Config) -> tuple[int, int]:
    """Where a parameter reads and where it writes, in the order of the forward pass."""
    module = re.sub(r"(?<=\.mlp\.gate)\.\w+$|\.weight$|[._]lora\.[AB]$|\.magnitude$", "", name)
    end = BLOCK * (config.model.num_hidden_layers + 1)
    if module == "model.embed_tokens":  # a tied one is multiplied as the head
        return end + 1, 0
    if not module.startswith("model.layers."):
        return (end, end + 1) if module == "model.norm" else (end + 1, end + 2)
    reads, writes = PLACES[module.rpartition(".")[2]]
    block = BLOCK * (int(module.split(".")[2]) + 1)
    return block + reads, block + writes


def _part(name: str) -> str:
    if not name.startswith("model.layers."):
        return "head"
    if f"{EXPERTS}." in name and ".shared_experts." not in name:
        return "experts"
    if ".self_attn." in name:
        return "attention"
    return "router" if ".mlp.gate." in name else "mlp"
