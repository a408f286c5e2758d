"""Frequencies of rotary positions for contexts longer than a model was first trained with.

Legend: D head dimension; frequency i of D/2 rotates dimensions i and i + D/2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def rotary_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any], device: torch.device
) -> tuple[Tensor, float]:
    """(angle per position of each pair of dimensions, float32 [D/2]; the factor on cos and sin).

    Without `scaling`, theta^(−2i/D) and 1. The order of float32 operations is transformers', so that weights trained
    there see the same rotation here.
    """
    exponents_D = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    frequencies_D = 1.0 / theta**exponents_D
    if not scaling:
        return frequencies_D, 1.0
    if scaling["rope_type"] == "llama3":
        return _llama3(frequencies_D, scaling), 1.0
    return _yarn(frequencies_D, head_dim, theta, scaling), _attention_factor(scaling)


def _llama3(frequencies_D: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Wavelengths above L/low are divided by `factor`, those below L/high kept, those between interpolated, with L the
    original number of positions (Llama 3.1, arXiv 2407.21783, §3.4.2, as published with its code)."""
    factor, low, high = (scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    length = scaling["original_max_position_embeddings"]
    wavelengths_D = 2 * math.pi / frequencies_D
    scaled_D = torch.where(wavelengths_D > length / low, frequencies_D / factor, frequencies_D)
    smooth_D = (length / wavelengths_D - low) / (high - low)
    smoothed_D = (1 - smooth_D) * scaled_D / factor + smooth_D * scaled_D
    between_D = ~(wavelengths_D < length / high) & ~(wavelengths_D > length / low)
    return torch.where(between_D, smoothed_D, scaled_D)


def _yarn(frequencies_D: Tensor, head_dim: int, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    """Between full interpolation (frequency / factor) and none, by how often a dimension turns within the original
    number of positions (YaRN, arXiv 2309.00071, eq. 17-20)."""
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]

    def dimension(turns: float) -> float:
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(scaling.get("beta_fast", 32)), dimension(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first if last != first else 0.001
    ramp_D = (torch.arange(head_dim // 2, device=frequencies_D.device).float() - first) / width
    kept_D = 1 - ramp_D.clamp(0, 1)
    powers_D = theta ** (torch.arange(0, head_dim, 2, device=frequencies_D.device).float() / head_dim)
    return 1.0 / (factor * powers_D) * (1 - kept_D) + 1.0 / powers_D * kept_D


def _attention_factor(scaling: Mapping[str, Any]) -> float:
    """YaRN's temperature, on cos and sin of queries and keys alike (arXiv 2309.00071, eq. 21-22)."""
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    factor = scaling["factor"]
    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return _temperature(factor, scaling["mscale"]) / _temperature(factor, scaling["mscale_all_dim"])
    return _temperature(factor, 1.0)


def _temperature(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
