"""Rotary position embedding (arXiv 2104.09864), Hugging Face's `rotate_half` pairing: dimension i turns with i + D/2.

Legend: B batch, S sequence, N heads, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(start: int, length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of positions start … start+length−1, float32 [length, head_dim / 2].

    The angles are float32 products, as in transformers, so that weights trained there see the same rotation here.
    """
    exponents_D = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies_D = (1.0 / theta**exponents_D).to(device)
    positions_S = torch.arange(start, start + length, device=device).float()
    angles_SD = positions_S[:, None] * frequencies_D
    return angles_SD.cos(), angles_SD.sin()


def rotate(x_BSND: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Every head turned by its position's angle; same shape and dtype as `x_BSND`."""
    cos_SD, sin_SD = (table.to(x_BSND.dtype)[:, None, :] for table in (cos_SD, sin_SD))
    first, second = x_BSND.chunk(2, dim=-1)
    return torch.cat((first * cos_SD - second * sin_SD, second * cos_SD + first * sin_SD), dim=-1)
