"""Llama (arXiv 2302.13971, 2407.21783): dense, full attention; a source for upcycling."""

from __future__ import annotations

from typing import Any

from moe.config import Mlp, ModelConfig, RouterConfig, TopKRouterConfig
from moe.interop.families.base import Family, read_backbone, require_mlp, require_no_window, write_backbone
from moe.interop.hub_config import HubConfig


def _read(family: Family, config: HubConfig) -> tuple[ModelConfig, RouterConfig]:
    return read_backbone(family, config, mlp=Mlp.dense), TopKRouterConfig()


def _write(model: ModelConfig, router: RouterConfig, step: int) -> dict[str, Any]:
    del router, step
    require_mlp(model, Mlp.dense)
    require_no_window(model)
    return write_backbone("llama", "LlamaForCausalLM", model) | {"attention_bias": False, "mlp_bias": False}


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read=_read,
    write=_write,
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    has_window=False,
)
