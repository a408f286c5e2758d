"""What all families share: the backbone's keys in a config.json, and the names of tensors.

Legend: E experts, F feed-forward, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from moe.config import (
    BiasUpdate,
    Initializer,
    Mlp,
    ModelConfig,
    QkNorm,
    RouterConfig,
    ScoringFunction,
    TokenChoiceConfig,
    TopKRouterConfig,
)
from moe.config.rope import ROPE_TYPES
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
    has_window: bool = True  # whether its code looks at sliding_window
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
    positions = config.count("max_position_embeddings", default["max_position_embeddings"])
    theta, scaling = _read_rope(config, default.get("rope_theta", 10000.0), positions)
    settings = {
        "vocab_size": config.count("vocab_size", default["vocab_size"]),
        "hidden_size": config.count("hidden_size", default["hidden_size"]),
        "intermediate_size": config.count("intermediate_size", default["intermediate_size"]),
        "num_hidden_layers": config.count("num_hidden_layers", default["num_hidden_layers"]),
        "num_attention_heads": heads,
        "num_key_value_heads": config.optional_count("num_key_value_heads", default["num_key_value_heads"]) or heads,
        "head_dim": config.optional_count("head_dim", default.get("head_dim")),
        "max_position_embeddings": positions,
        "rms_norm_eps": config.real("rms_norm_eps", default["rms_norm_eps"]),
        "initializer": Initializer.normal,
        "initializer_range": config.real("initializer_range", 0.02),
        "tie_word_embeddings": config.flag("tie_word_embeddings", False),
        "sliding_window": read_window(family, config),
        "rope_theta": theta,
        "rope_scaling": scaling,
    }
    try:
        return ModelConfig(**settings | more)
    except UserError as error:
        raise UserError(f"{config.path}: {error}") from error


def read_window(family: Family, config: HubConfig) -> int | None:
    """`sliding_window`, which all layers must have or none."""
    if not family.has_window:
        config.only("sliding_window", [None], f"{family.model_type} has no window")
    window = config.optional_count("sliding_window", family.defaults.get("sliding_window"))
    if "use_sliding_window" in family.defaults:
        if not config.flag("use_sliding_window", family.defaults["use_sliding_window"]):
            window = None
    elif window is not None:
        config.only("use_sliding_window", [True], f"transformers' {family.model_type} reads sliding_window alone")
    else:
        config.only("use_sliding_window", [True, False, None], "a flag")
    before = config.count("max_window_layers", family.defaults.get("max_window_layers", 0), at_least=0)
    kinds = config.take("layer_types", None, lambda v: v is None or isinstance(v, list), "a list of kinds of attention")
    if window is not None and kinds is None and before > 0 and "max_window_layers" in family.defaults:
        raise UserError(
            f"{config.path}: max_window_layers={before} with sliding_window={window} is not supported: the first "
            "layers would have no window; it must be 0, or use_sliding_window false"
        )
    wanted = "full_attention" if window is None else "sliding_attention"
    if kinds is not None and any(kind != wanted for kind in kinds):
        raise UserError(
            f"{config.path}: layer_types={sorted(set(map(str, kinds)))} with sliding_window={window} is not supported: "
            f"all layers must be {wanted}"
        )
    return window


def _read_rope(config: HubConfig, default_theta: float, positions: int) -> tuple[float, dict[str, Any]]:
    """(rope_theta, scaling), of transformers 4's keys (`rope_theta`, `rope_scaling`) or 5's (`rope_parameters`)."""
    theta, scaling = config.real("rope_theta", default_theta), {}
    for key in ("rope_parameters", "rope_scaling"):
        stated = config.take(key, None, lambda value: value is None or isinstance(value, dict), "an object, or null")
        if stated is None:
            continue
        inner = HubConfig(config.path.parent, stated, f"{key}.")
        name = "type" if "type" in stated and "rope_type" not in stated else "rope_type"
        kind = inner.take(name, "default", lambda v: v in ("default", *ROPE_TYPES), f"default, {', '.join(ROPE_TYPES)}")
        inner.only("type", [kind], "rope_type says the same")
        inner.only("partial_rotary_factor", [1, 1.0, None], "all dimensions are rotated")
        theta, scaling = inner.real("rope_theta", theta), {}
        if kind != "default":
            needed, optional = ROPE_TYPES[kind]
            given = {one: inner.take(one, None, lambda _: True, "") for one in needed + optional}
            given["original_max_position_embeddings"] = given["original_max_position_embeddings"] or positions
            scaling = {"rope_type": kind} | {one: value for one, value in given.items() if value is not None}
        inner.finish(())
    return theta, scaling


def write_backbone(family: str, architecture: str, model: ModelConfig, qk_norm: QkNorm = QkNorm.none) -> dict[str, Any]:
    """The keys that all families have. Raises UserError where the model has other norms of queries and keys."""
    _require(model.qk_norm is qk_norm, f"model.qk_norm={model.qk_norm.name} must be {qk_norm.name}")
    rope: dict[str, Any] = {"rope_theta": model.rope_theta}
    if model.rope_scaling:  # for versions of before `rope_parameters`
        rope["rope_scaling"] = dict(model.rope_scaling)
    rope["rope_parameters"] = {"rope_type": "default", **model.rope_scaling, "rope_theta": model.rope_theta}
    return {
        "architectures": [architecture],
        "model_type": family,
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
        **rope,
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def read_router(config: HubConfig, experts_key: str, defaults: dict[str, Any], *, norm: bool | None) -> RouterConfig:
    """A softmax router. `norm`: whether the chosen experts' weights are divided by their sum; None: as the config says.
    Raises UserError naming the key."""
    if norm is None:
        norm = config.flag("norm_topk_prob", False)
    try:
        return TopKRouterConfig(
            num_experts=config.count(experts_key, defaults["num_experts"]),
            top_k=config.count("num_experts_per_tok", defaults["num_experts_per_tok"]),
            norm_topk_prob=norm,
            aux_loss_coef=config.real("router_aux_loss_coef", defaults["router_aux_loss_coef"]),
            jitter_noise=config.real("router_jitter_noise", 0.0),
            z_loss_coef=0.0,
        )
    except UserError as error:
        raise UserError(f"{config.path}: {error}") from error


def write_router(router: TokenChoiceConfig, top_k: int) -> dict[str, Any]:
    """The keys that all sparse families have."""
    return {
        "num_experts_per_tok": top_k,
        "router_aux_loss_coef": router.aux_loss_coef,
        "output_router_logits": False,
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


def require_no_window(model: ModelConfig) -> None:
    _require(model.sliding_window is None, f"model.sliding_window={model.sliding_window} must be null")


def require_all_sparse(model: ModelConfig) -> None:
    layers = len(model.sparse_layer_numbers)
    _require(
        layers == model.num_hidden_layers, f"model.sparse_layers={model.sparse_layers} must be all: {layers} are sparse"
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
