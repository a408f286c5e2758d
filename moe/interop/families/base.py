"""What all families share: the backbone's keys in a config.json, and the names of tensors.

Legend: E experts, F feed-forward, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from moe.config import BiasUpdate, Mlp, ModelConfig, RouterConfig, ScoringFunction, TokenChoiceConfig
from moe.errors import UserError
from moe.interop.hub_config import HubConfig


@dataclass(frozen=True, slots=True)
class DiskTensor:
    """A tensor of a Hugging Face folder, and which part of one of ours it is: the whole; or of the stacked experts'
    one expert's, of which `rows` are the rows (None: all)."""

    name: str
    shape: tuple[int, ...]
    ours: str
    expert: int | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """`defaults` are transformers' for keys that a config.json leaves out. `expert_names` are those of gate, up and
    down projections, and `sparse_name` that of the sparse layer, on disk."""

    model_type: str
    architecture: str
    read: Callable[[Family, HubConfig], tuple[ModelConfig, RouterConfig]]
    write: Callable[[ModelConfig, RouterConfig, int], dict[str, Any]]
    defaults: dict[str, Any] = field(default_factory=dict)
    sparse_name: str = "mlp"
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    def on_disk(self, name: str, shape: tuple[int, ...]) -> Iterator[DiskTensor]:
        """The tensors that transformers writes for ours called `name`, whose bytes, one after the other, are its."""
        if not (found := _EXPERTS.fullmatch(name)):
            yield DiskTensor(self._renamed(name), shape, name)
            return
        gate, up, down = self.expert_names
        experts, rows, columns = shape
        for expert in range(experts):
            prefix = f"{found['layer']}.{self.sparse_name}.experts.{expert}"
            if found["projection"] == "down_proj":
                yield DiskTensor(f"{prefix}.{down}.weight", (rows, columns), name, expert)
            else:
                half = rows // 2
                yield DiskTensor(f"{prefix}.{gate}.weight", (half, columns), name, expert, (0, half))
                yield DiskTensor(f"{prefix}.{up}.weight", (half, columns), name, expert, (half, rows))

    def stacked(self, name: str, shape: tuple[int, ...]) -> list[DiskTensor]:
        """The same in the layout of `save_pretrained(save_original_format=False)`: as ours."""
        return [DiskTensor(name, shape, name)]

    def _renamed(self, name: str) -> str:
        return _GATE.sub(rf"\1.{self.sparse_name}.gate.weight", name)


_EXPERTS = re.compile(r"(?P<layer>model\.layers\.\d+)\.mlp\.experts\.(?P<projection>gate_up_proj|down_proj)")
_GATE = re.compile(r"^(model\.layers\.\d+)\.mlp\.gate\.weight$")


def read_backbone(family: Family, config: HubConfig, **more: Any) -> ModelConfig:
    """The keys that all families have. Raises UserError naming the key."""
    default = family.defaults
    config.only("hidden_act", ["silu"], "the activation is SwiGLU's")
    config.only("attention_dropout", [0, 0.0, None], "attention has no dropout")
    for key in ("attention_bias", "mlp_bias"):
        config.only(key, [False], "projections have no bias")
    for key in (
        "is_encoder_decoder",
        "add_cross_attention",
        "is_decoder",
        "tie_encoder_decoder",
        "cross_attention_hidden_size",
    ):
        config.only(key, [False, None], "the model is a decoder alone")
    heads = config.count("num_attention_heads", default["num_attention_heads"])
    theta = _read_rope(config, default.get("rope_theta", 10000.0))
    settings = {
        "vocab_size": config.count("vocab_size", default["vocab_size"]),
        "hidden_size": config.count("hidden_size", default["hidden_size"]),
        "intermediate_size": config.count("intermediate_size", default["intermediate_size"]),
        "num_hidden_layers": config.count("num_hidden_layers", default["num_hidden_layers"]),
        "num_attention_heads": heads,
        "num_key_value_heads": config.optional_count("num_key_value_heads", default["num_key_value_heads"]) or heads,
        "head_dim": config.optional_count("head_dim"),
        "max_position_embeddings": config.count("max_position_embeddings", default["max_position_embeddings"]),
        "rms_norm_eps": config.real("rms_norm_eps", default["rms_norm_eps"]),
        "initializer_range": config.real("initializer_range", 0.02),
        "tie_word_embeddings": config.flag("tie_word_embeddings", False),
        "sliding_window": read_window(family, config),
        "rope_theta": theta,
    }
    try:
        return ModelConfig(**settings | more)
    except UserError as error:
        raise UserError(f"{config.path}: {error}") from error


def read_window(family: Family, config: HubConfig) -> int | None:
    """`sliding_window`, which all layers must have or none."""
    window = config.optional_count("sliding_window", family.defaults.get("sliding_window"))
    if not config.take("use_sliding_window", True, lambda value: isinstance(value, bool), "true or false"):
        window = None
    config.optional_count("max_window_layers")
    kinds = config.take("layer_types", None, lambda v: v is None or isinstance(v, list), "a list of kinds of attention")
    wanted = "full_attention" if window is None else "sliding_attention"
    if kinds is not None and any(kind != wanted for kind in kinds):
        raise UserError(
            f"{config.path}: layer_types={sorted(set(map(str, kinds)))} with sliding_window={window} is not supported: "
            f"all layers must be {wanted}"
        )
    return window


def _read_rope(config: HubConfig, default: float) -> float:
    """rope_theta, of transformers 4's keys (`rope_theta`, `rope_scaling`) or 5's (`rope_parameters`)."""
    theta = config.real("rope_theta", default)
    for key in ("rope_parameters", "rope_scaling"):
        stated = config.take(key, None, lambda value: value is None or isinstance(value, dict), "an object, or null")
        if stated is None:
            continue
        inner = HubConfig(config.path.parent, stated, f"{key}.")
        for name in ("rope_type", "type"):
            inner.only(name, ["default"], "no scaling of positions")
        inner.only("partial_rotary_factor", [1, 1.0, None], "all dimensions are rotated")
        theta = inner.real("rope_theta", theta)
        inner.finish(())
    return theta


def write_backbone(family_type: str, architecture: str, model: ModelConfig) -> dict[str, Any]:
    """The keys that all families have."""
    return {
        "architectures": [architecture],
        "model_type": family_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.initializer_range,
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def require_plain_router(model: ModelConfig, router: RouterConfig, step: int) -> tuple[TokenChoiceConfig, int]:
    """The router, which must be one that transformers' modules compute, and its experts per token after `step` steps.
    Raises UserError."""
    if not isinstance(router, TokenChoiceConfig) or router.kind not in ("topk", "noisy_topk"):
        raise UserError(f"router.kind={router.kind} is none of its routers")
    for key, plain in (
        ("scoring_func", ScoringFunction.softmax),
        ("routed_scaling_factor", 1.0),
        ("bias_update", BiasUpdate.none),
    ):
        value = getattr(router, key)
        _require(
            value == plain, f"router.{key}={getattr(value, 'name', value)} must be {getattr(plain, 'name', plain)}"
        )
    _require(model.n_shared_experts == 0, f"model.n_shared_experts={model.n_shared_experts} must be 0")
    top_k = router.at("top_k", max(0, step - 1))
    for layer in router.layers:
        own = router.for_layer(layer)
        same = own.at("top_k", max(0, step - 1)) == top_k and own.norm_topk_prob == router.norm_topk_prob
        _require(same and own.scoring_func is router.scoring_func, f"router.layers.{layer} must be as the other layers")
    return router, top_k


def require_mlp(model: ModelConfig, mlp: Mlp) -> None:
    """Raises UserError where the model's layers are of the other kind."""
    _require(model.mlp is mlp, f"model.mlp={model.mlp.name} must be {mlp.name}")


def require_all_sparse(model: ModelConfig) -> None:
    layers = len(model.sparse_layer_numbers)
    _require(
        layers == model.num_hidden_layers, f"model.sparse_layers={model.sparse_layers} must be all: {layers} are sparse"
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
