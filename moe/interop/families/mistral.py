"""Mistral (arXiv 2310.06825): dense."""

from __future__ import annotations

from typing import Any

from moe.config import Mlp, ModelConfig, RouterConfig, TopKRouterConfig
from moe.interop.families.base import Family, read_backbone, require_mlp, write_backbone
from moe.interop.hub_config import HubConfig


def _read(family: Family, config: HubConfig) -> tuple[ModelConfig, RouterConfig]:
    return read_backbone(family, config, mlp=Mlp.dense), TopKRouterConfig()


def _write(model: ModelConfig, router: RouterConfig, step: int) -> dict[str, Any]:
    del router, step
    require_mlp(model, Mlp.dense)
    return write_backbone("mistral", "MistralForCausalLM", model) | {"sliding_window": model.sliding_window}


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
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
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
)
