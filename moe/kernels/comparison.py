"""How far a kernel's results are from its plain reference's."""

from __future__ import annotations

from torch import Tensor


def relative_error(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The largest difference of any result, relative to its largest value; NaN is infinite."""
    errors = []
    for mine, other in zip(found, wanted, strict=True):
        difference = (mine.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30)
        errors.append(float(difference.nan_to_num(nan=float("inf"))))
    return max(errors)
