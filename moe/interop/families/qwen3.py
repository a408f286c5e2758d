"""Qwen3 (arXiv 2505.09388), dense and sparse: RMSNorm of each head's queries and keys, a head size of its own."""

from __future__ import annotations

from typing import Any

from moe.config import Mlp, ModelConfig, QkNorm, RouterConfig, TopKRouterConfig
from moe.errors import UserError
from moe.interop.families.base import (
    Family,
    read_backbone,
    read_router,
    require_mlp,
    require_plain_router,
    write_backbone,
    write_router,
)
from moe.interop.hub_config import HubConfig
from moe.untrusted import is_count

BACKBONE = {"vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "sliding_window": 4096}


def _read_dense(family: Family, config: HubConfig) -> tuple[ModelConfig, RouterConfig]:
    return read_backbone(family, config, mlp=Mlp.dense, qk_norm=QkNorm.head), TopKRouterConfig()


def _write_dense(model: ModelConfig, router: RouterConfig, step: int) -> dict[str, Any]:
    del router, step
    require_mlp(model, Mlp.dense)
    written = write_backbone("qwen3", "Qwen3ForCausalLM", model, QkNorm.head) | _window(model)
    kind = "full_attention" if model.sliding_window is None else "sliding_attention"
    return written | {"attention_bias": False, "max_window_layers": 0, "layer_types": [kind] * model.num_hidden_layers}


def _window(model: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": model.sliding_window, "use_sliding_window": model.sliding_window is not None}


def _read_sparse(family: Family, config: HubConfig) -> tuple[ModelConfig, RouterConfig]:
    key = "num_local_experts" if "num_local_experts" in config.values else "num_experts"
    width = config.count("moe_intermediate_size", family.defaults["moe_intermediate_size"])
    layers = config.count("num_hidden_layers", family.defaults["num_hidden_layers"])
    more = {"mlp": Mlp.sparse, "qk_norm": QkNorm.head, "moe_intermediate_size": width}
    model = read_backbone(family, config, **more, sparse_layers=_sparse_layers(config, layers))
    return model, read_router(config, key, family.defaults, norm=None)


def _sparse_layers(config: HubConfig, layers: int) -> str | list[int]:
    """Every `decoder_sparse_step`-th layer, less `mlp_only_layers`; as `model.sparse_layers` has it."""
    step = config.count("decoder_sparse_step", 1)
    dense = config.take(
        "mlp_only_layers",
        [],
        lambda value: value is None or (isinstance(value, list) and all(is_count(one, 10**9) for one in value)),
        "a list of layers",
    )
    if not dense:
        return f"every_{step}" if step > 1 else "all"
    if layers > 10**5:  # far more than any model's, and a list is made of them
        raise UserError(f"{config.path}: num_hidden_layers={layers} must be ≤ {10**5}")
    return [layer for layer in range(step - 1, layers, step) if layer not in dense]


def _write_sparse(model: ModelConfig, router: RouterConfig, step: int) -> dict[str, Any]:
    require_mlp(model, Mlp.sparse)
    plain, top_k = require_plain_router(model, router, step)
    written = write_backbone("qwen3_moe", "Qwen3MoeForCausalLM", model, QkNorm.head) | _window(model)
    sparse = set(model.sparse_layer_numbers)
    return written | {
        "moe_intermediate_size": model.expert_size,
        "num_experts": plain.num_experts,
        "norm_topk_prob": plain.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(model.num_hidden_layers) if layer not in sparse],
        "attention_bias": False,
        **write_router(plain, top_k),
    }


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read=_read_dense,
    write=_write_dense,
    defaults={
        **BACKBONE,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read=_read_sparse,
    write=_write_sparse,
    defaults={
        **BACKBONE,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "router_aux_loss_coef": 0.001,
        "use_sliding_window": False,
    },
)
