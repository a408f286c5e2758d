"""What `optim=muon` costs: Newton–Schulz steps on every matrix, and one moment instead of two.

A step on a matrix with m rows and n ≥ m columns (or the other way round) is 4 m² n + 2 m³ FLOPs: x xᵀ, its square, and
the product with x. Legend: O rows, I columns of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moe.config import Config, OptimizerKind, Precision
from moe.config.optim import ITERATIONS, MOST_ELEMENTS, matrix_shape
from moe.plan.trained import parameter_shapes, routed_experts, trained_shapes, trains_all


@dataclass(frozen=True, slots=True)
class MuonCost:
    """Zero for `optim=adamw`. `flops`: of one optimizer step, all ranks together; a matrix that several ranks have a
    part of is counted once. `local` and `share`: parameters on a rank that Muon updates, and those of its partition.
    `working`: bytes that a rank needs to orthogonalise matrices, beside their gradients."""

    flops: float = 0.0
    local: int = 0
    share: float = 0.0
    working: int = 0


def muon_cost(config: Config, world_size: int, *, device: str = "cpu") -> MuonCost:
    if config.optim.kind is not OptimizerKind.muon:
        return MuonCost()
    expert = config.parallel.expert_parallel_size
    half = device == "cuda" and config.train.precision is Precision.bfloat16
    flops, local, share, working = 0.0, 0, 0.0, 0
    for name, size, (rows, columns) in _matrices(config):
        short, long = sorted((rows, columns))
        flops += size / (rows * columns) * ITERATIONS * (4 * short**2 * long + 2 * short**3)
        slices = expert if routed_experts(name) else 1
        local += size // slices
        share += size / world_size
        one = rows * columns
        at_once = min(size // slices, max(1, MOST_ELEMENTS // one) * one)
        # float32: x, the next x, and two squares; bfloat16: the float32 result beside x and the next x, and the squares
        each = (8 if half else 8 + 8 * short / long) + (4 * short / long if half else 0)
        completed = 0 if world_size == slices else 16 * one  # two cut matrices, and what is sent and received of them
        working = max(working, round(each * at_once) + completed)
    return MuonCost(flops, local, share, working)


def _matrices(config: Config) -> Iterator[tuple[str, int, tuple[int, int]]]:
    """(name, elements, rows and columns of each matrix) of the parameters that Muon updates, with all experts."""
    shapes = parameter_shapes(config) if trains_all(config) else trained_shapes(config)
    for name, shape in shapes.items():
        if (matrix := matrix_shape(name, shape)) is not None:
            yield name, math.prod(shape), matrix
