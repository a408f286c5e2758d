"""Which parameters train, by name and shape, from the configuration alone: all, all but `optim.freeze`, an adapter's.

Legend: E experts, H hidden, F feed-forward, D head dimension, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from moe.config import Config, QkNorm
from moe.config.adapter import WITH_DROPOUT
from moe.config.rules import require

EXPERTS = ".experts"
HEADS = ("lm_head.weight", "model.embed_tokens.weight")
MOST_LAYERS = 10_000  # whose parameters are told apart by name


def routed_experts(name: str) -> bool:
    """Whether a parameter is stacked experts', of which a rank holds a slice."""
    return EXPERTS in name and "shared" not in name


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """{name: shape} of every parameter of the model without adapters, with all experts."""
    return dict(_named(config))


def _named(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    model, router = config.model, config.router
    hidden, head = model.hidden_size, model.head_size
    queries, keys = model.num_attention_heads * head, model.num_key_value_heads * head
    yield "model.embed_tokens.weight", (model.vocab_size, hidden)
    for layer in range(model.num_hidden_layers):
        block = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{block}.{norm}.weight", (hidden,)
        for name, size in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{block}.self_attn.{name}_proj.weight", (size, hidden)
        yield f"{block}.self_attn.o_proj.weight", (hidden, queries)
        if model.qk_norm is not QkNorm.none:
            for name, size in (("q", queries), ("k", keys)):
                yield f"{block}.self_attn.{name}_norm.weight", (head if model.qk_norm is QkNorm.head else size,)
        if layer not in model.sparse_layer_numbers:
            yield from _swiglu(f"{block}.mlp", hidden, model.intermediate_size)
            continue
        for name in router.parameter_names():
            yield f"{block}.mlp.gate.{name}", (router.num_experts, hidden)
        yield f"{block}.mlp.experts.gate_up_proj", (router.num_experts, 2 * model.expert_size, hidden)
        yield f"{block}.mlp.experts.down_proj", (router.num_experts, hidden, model.expert_size)
        if model.shared_size:
            yield from _swiglu(f"{block}.mlp.shared_experts", hidden, model.shared_size)
    yield "model.norm.weight", (hidden,)
    if not model.tie_word_embeddings:
        yield "lm_head.weight", (model.vocab_size, hidden)


def _swiglu(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((f"{prefix}.{name}_proj.weight", (width, hidden)) for name in ("gate", "up"))
    yield f"{prefix}.down_proj.weight", (hidden, width)


def trained_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """{name: shape} of what trains, adapters included. Raises UserError for more than MOST_LAYERS layers, and for a
    pattern of `adapter` or `optim.freeze` that fits nothing, as a run does."""
    layers = config.model.num_hidden_layers
    require(layers <= MOST_LAYERS, f"model.num_hidden_layers={layers} must be ≤ {MOST_LAYERS} where a part trains")
    adapter, everything = config.adapter, parameter_shapes(config)
    trained = named = everything
    if adapter.trains_adapter:
        can = [name for name, shape in everything.items() if _can_have_adapter(name, shape)]
        adapter.require_targets([*map(_module, can)])
        adapted = {name for name in can if adapter.adapts(_module(name))}
        added = adapter_shapes(config, everything)
        named = everything | added
        trained = {name: everything[name] for name in adapter.saved_in_full([*everything], adapted)} | added
    return {name: trained[name] for name in config.optim.left_to_train([*named], [*trained])}


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _can_have_adapter(name: str, shape: tuple[int, ...]) -> bool:
    if len(shape) == 2:
        return name.endswith(".weight") and _module(name).rpartition(".")[2] not in ("embed_tokens", "lm_head")
    return len(shape) == 3


def adapter_shapes(config: Config, everything: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the adapters' parameters; {} without an adapter. `everything` is `parameter_shapes`."""
    return dict(_low_rank(config, everything)) if config.adapter.trains_adapter else {}


def _low_rank(config: Config, everything: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    adapter = config.adapter
    for name, shape in everything.items():
        module = _module(name)
        if not _can_have_adapter(name, shape) or not adapter.adapts(module):
            continue
        rank = adapter.rank_of(module)
        *experts, out_size, in_size = shape
        prefix = f"{name}_lora" if experts else f"{module}.lora"
        yield f"{prefix}.A", (*experts, rank, in_size)
        yield f"{prefix}.B", (*experts, out_size, rank)
        if adapter.use_dora and module.rpartition(".")[2] in WITH_DROPOUT:
            yield f"{module}.magnitude", (out_size,)


def count_trained(config: Config) -> int:
    """Parameters that train, over all ranks."""
    return sum(map(math.prod, trained_shapes(config).values()))


def trains_all(config: Config) -> bool:
    """Whether every parameter trains and there are no adapters."""
    return not config.adapter.trains_adapter and not config.optim.freeze
