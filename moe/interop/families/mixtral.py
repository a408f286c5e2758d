"""Mixtral (arXiv 2401.04088): a sparse layer in every block, weights of the chosen experts sum to 1."""

from __future__ import annotations

from typing import Any

from moe.config import Mlp, ModelConfig, RouterConfig
from moe.errors import UserError
from moe.interop.families.base import (
    Family,
    read_backbone,
    read_router,
    require_all_sparse,
    require_mlp,
    require_plain_router,
    write_backbone,
    write_router,
)
from moe.interop.hub_config import HubConfig


def _read(family: Family, config: HubConfig) -> tuple[ModelConfig, RouterConfig]:
    model = read_backbone(family, config, mlp=Mlp.sparse)
    return model, read_router(config, "num_local_experts", family.defaults, norm=True)


def _write(model: ModelConfig, router: RouterConfig, step: int) -> dict[str, Any]:
    require_mlp(model, Mlp.sparse)
    require_all_sparse(model)
    plain, top_k = require_plain_router(model, router, step)
    if not plain.norm_topk_prob:
        raise UserError("router.norm_topk_prob=false must be true")
    return write_backbone("mixtral", "MixtralForCausalLM", model) | {
        "intermediate_size": model.expert_size,
        "sliding_window": model.sliding_window,
        "num_local_experts": plain.num_experts,
        "router_jitter_noise": plain.jitter_noise,
        **write_router(plain, top_k),
    }


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read=_read,
    write=_write,
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
    sparse_name="block_sparse_moe",
    expert_names=("w1", "w3", "w2"),
)
