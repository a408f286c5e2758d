"""The sparse layer in `moe bench peers`: ours beside transformers' block and DeepSpeed's MoE, forward and backward."""

from __future__ import annotations

import math

import torch

from moe.bench.clock import clock
from moe.bench.kernel_cases import Cases
from moe.bench.kernel_cases_layer import DEEPSPEED
from moe.bench.kernels import COLUMNS, DIFFERENCE, Limits, measure
from moe.bench.results import Cell, Results, ResultTable
from moe.config import Config

LEFT_OUT = "GB/s"


def compare_layers(config: Config, dtype: torch.dtype, rounds: int, peak: float) -> Results:
    """A row for each side, with its own routing and with uniform routing, of the first layer in `config`'s shape on the
    CPU; `peak` is the FLOP/s of a matrix product. Raises RuntimeError where outputs or gradients disagree."""
    names = ["% of product" if name == "% of limit" else name for name in COLUMNS]
    limits, rows = Limits(peak, math.inf), list[list[Cell]]()
    for case in Cases(config, dtype).layers():
        rows += measure(case, rounds, limits, DIFFERENCE[dtype])
    slower = next(float(row[COLUMNS.index("× ours")] or 0) for row in rows if row[1] == DEEPSPEED)
    columns = [column for column, name in enumerate(COLUMNS) if name != LEFT_OUT]
    table = ResultTable([names[column] for column in columns], [[row[column] for column in columns] for row in rows])
    note = f"sparse layers: outputs and gradients agree within {DIFFERENCE[dtype]:.0e}, {clock()}"
    return Results([table], [note], {f"ratio to {DEEPSPEED} layer {{}}": slower})
