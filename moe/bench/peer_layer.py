"""The sparse layer in `moe bench peers`: ours beside transformers' block and DeepSpeed's MoE, forward and backward."""

from __future__ import annotations

import math

from moe.bench.clock import clock, now
from moe.bench.kernel_cases import Cases
from moe.bench.kernel_cases_layer import DEEPSPEED
from moe.bench.kernels import COLUMNS, DIFFERENCE, Limits, measure
from moe.bench.results import Cell, Results, ResultTable
from moe.bench.roofline import CPU
from moe.config import Config
from moe.kernels.policy import torch_dtype
from moe.train.metrics import measure_peak_flops

LEFT_OUT, RENAMED = "GB/s", {"kernel": "", "% of limit": "% of product"}


def compare_layers(config: Config, rounds: int) -> Results:
    """A row for each side, with its own routing and with uniform routing, of the first layer in `config`'s shape on the
    CPU. Raises RuntimeError where outputs or gradients disagree."""
    dtype = torch_dtype(config.train.precision)
    peak = max(measure_peak_flops(CPU, dtype, clock=now) for _ in range(rounds))
    names, rows = [RENAMED.get(name, name) for name in COLUMNS], list[list[Cell]]()
    limits = Limits(peak, math.inf)
    for case in Cases(config, dtype).layers():
        rows += measure(case, rounds, limits, DIFFERENCE[dtype])
    slower = next(float(row[COLUMNS.index("× ours")] or 0) for row in rows if row[1] == DEEPSPEED)
    columns = [column for column, name in enumerate(COLUMNS) if name != LEFT_OUT]
    cells = [[row[column] for column in columns] for row in rows]
    table = ResultTable([names[column] for column in columns], cells, "one layer, forward and backward")
    note = f"sparse layers: outputs and gradients agree within {DIFFERENCE[dtype]:.0e}, {clock()}"
    return Results([table], [note], {f"ratio to {DEEPSPEED} layer {{}}": slower})
