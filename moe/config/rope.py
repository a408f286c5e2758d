"""`model.rope_scaling`: Hugging Face's keys of each way to scale rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe.config.rules import MAX_COUNT, MAX_REAL, require

# {rope_type: (keys that must be there, keys that may be)}
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def check_rope_scaling(key: str, scaling: Mapping[str, Any]) -> None:
    """Raises UserError naming the key inside `scaling` that breaks a rule; {} is no scaling."""
    if not scaling:
        return
    kind = scaling.get("rope_type")
    known = isinstance(kind, str) and kind in ROPE_TYPES
    require(known, f"{key}.rope_type={kind} must be one of {', '.join(ROPE_TYPES)}; {{}} scales nothing")
    needed, optional = ROPE_TYPES[str(kind)]
    for name in needed:
        require(name in scaling, f"{key}.{name} must be set for rope_type={kind}")
    for name, value in scaling.items():
        known = name == "rope_type" or name in needed + optional
        require(known, f"{key}.{name}: no key of rope_type={kind}, which has {', '.join(needed + optional)}")
        if name == "truncate":
            require(isinstance(value, bool), f"{key}.truncate={value} must be true or false")
        elif name == "original_max_position_embeddings":
            require(type(value) is int and 1 <= value <= MAX_COUNT, f"{key}.{name}={value} must be a whole number ≥ 1")
        elif name != "rope_type":
            number = type(value) in (int, float) and 0 < value <= MAX_REAL
            require(number, f"{key}.{name}={value} must be a number > 0")
    require(scaling["factor"] >= 1, f"{key}.factor={scaling['factor']} must be ≥ 1")
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        require(low < high, f"{key}.low_freq_factor={low} must be < {key}.high_freq_factor={high}")
