"""OLMoE (arXiv 2409.02060): many narrow experts, plain probabilities as weights, RMSNorm of whole projections."""

from __future__ import annotations

from typing import Any

from moe.config import Mlp, ModelConfig, QkNorm, RouterConfig
from moe.errors import UserError
from moe.interop.families.base import (
    Family,
    read_backbone,
    read_router,
    require_all_sparse,
    require_mlp,
    require_no_window,
    require_plain_router,
    write_backbone,
    write_router,
)
from moe.interop.hub_config import HubConfig


def _read(family: Family, config: HubConfig) -> tuple[ModelConfig, RouterConfig]:
    config.only("clip_qkv", [None], "queries, keys and values are not clipped")
    model = read_backbone(family, config, mlp=Mlp.sparse, qk_norm=QkNorm.projection)
    if model.head_size * model.num_attention_heads != model.hidden_size:
        raise UserError(f"{config.path}: head_dim={model.head_dim} must be hidden_size / num_attention_heads")
    return model, read_router(config, "num_experts", family.defaults, norm=None)


def _write(model: ModelConfig, router: RouterConfig, step: int) -> dict[str, Any]:
    require_mlp(model, Mlp.sparse)
    require_all_sparse(model)
    require_no_window(model)
    plain, top_k = require_plain_router(model, router, step)
    written = write_backbone("olmoe", "OlmoeForCausalLM", model, QkNorm.projection)
    if written.pop("head_dim") * model.num_attention_heads != model.hidden_size:
        raise UserError(f"model.head_dim={model.head_size} must be hidden_size / num_attention_heads")
    return written | {
        "intermediate_size": model.expert_size,
        "num_experts": plain.num_experts,
        "norm_topk_prob": plain.norm_topk_prob,
        "attention_bias": False,
        "clip_qkv": None,
        **write_router(plain, top_k),
    }


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    read=_read,
    write=_write,
    defaults={
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "router_aux_loss_coef": 0.01,
    },
    has_window=False,
)
