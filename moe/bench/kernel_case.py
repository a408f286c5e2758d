"""A kernel with its references, as `moe bench kernels` measures it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Side:
    """One implementation. `leaves` are what gradients are computed of, in one order on all sides; none: there is no
    backward pass. Where an implementation has other leaves, `as_ours` puts their gradients into that order and its
    shapes."""

    forward: Callable[[], Sequence[Tensor]]
    leaves: Sequence[Tensor] = ()
    as_ours: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list


@dataclass(frozen=True, slots=True)
class Case:
    """`flops` are the products' alone, forward and backward; `bytes` the memory traffic, None: each leaf and output is
    read or written once a pass, and their gradients once."""

    name: str
    sides: dict[str, Side]
    flops: float = 0.0
    bytes: float | None = None
    max_violation: float | None = None
