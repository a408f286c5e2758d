"""Mixtral (arXiv 2401.04088): a sparse layer in every block, weights of the chosen experts sum to 1."""

from __future__ import annotations

from typing import Any

from moe.config import Mlp, ModelConfig, RouterConfig, TopKRouterConfig
from moe.errors import UserError
from moe.interop.families.base import (
    Family,
    read_backbone,
    require_all_sparse,
    require_mlp,
    require_plain_router,
    write_backbone,
)
from moe.interop.hub_config import HubConfig


def _read(family: Family, config: HubConfig) -> tuple[ModelConfig, RouterConfig]:
    model = read_backbone(family, config, mlp=Mlp.sparse)
    try:
        router = TopKRouterConfig(
            num_experts=config.count("num_local_experts", 8),
            top_k=config.count("num_experts_per_tok", 2),
            aux_loss_coef=config.real("router_aux_loss_coef", 0.001),
            jitter_noise=config.real("router_jitter_noise", 0.0),
            z_loss_coef=0.0,
        )
    except UserError as error:
        raise UserError(f"{config.path}: {error}") from error
    return model, router


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
        "num_experts_per_tok": top_k,
        "router_aux_loss_coef": plain.aux_loss_coef,
        "router_jitter_noise": plain.jitter_noise,
        "output_router_logits": False,
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
    },
    sparse_name="block_sparse_moe",
    expert_names=("w1", "w3", "w2"),
)
