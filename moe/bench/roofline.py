"""`moe bench roofline`: what this CPU can do at most: matrix products by every route, copies, a small operation.

    moe bench roofline                          the products of a step of `moe bench peers`, and a large square
    moe bench roofline rounds=9 model=tiny      any key of `moe train`

Routes: float32 as torch computes it (by MKL, on x86), float32 by oneDNN (`moe.kernels.float32_products`; on cores with
AMX units it rounds to bfloat16, and its error says so; without AVX-512 torch computes it by MKL too), bfloat16 as torch
computes it (by oneDNN), and bfloat16 in float32 from widened factors (`moe.kernels.bfloat16_products`). Rounds
alternate the routes. A figure is the largest of its rounds: other programs only take speed away.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.bench.clock import conditions, now
from moe.bench.peer_keys import DEFAULTS
from moe.bench.results import Cell, Results, ResultTable
from moe.bench.settings import Rounds, counted, least_steady, split
from moe.config import Config, Mlp
from moe.config.compose import load_config
from moe.kernels import bfloat16_products, float32_products
from moe.kernels.cross_entropy import slice_rows
from moe.train.metrics import measure_peak_flops

CPU = torch.device("cpu")
SQUARE = 2048
COPIED = 1 << 28  # bytes: more than a share of a server's cache
SMALL_CALLS = 10_000


@dataclass(frozen=True, slots=True)
class ProductRoute:
    name: str
    dtype: torch.dtype
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    product: Callable[[Tensor, Tensor], Tensor] = torch.mm


ROUTES = (
    ProductRoute("float32", torch.float32),
    ProductRoute("float32 by oneDNN", torch.float32, float32_products.forced_onednn),
    ProductRoute("bfloat16", torch.bfloat16),
    ProductRoute("bfloat16, widened", torch.bfloat16, product=bfloat16_products.widened_mm),
)


def run(overrides: list[str]) -> Results:
    """Three tables; the last line is `float32 GFLOP/s N.NN`, the fastest of the products. Raises UserError."""
    keys, config = parse(overrides)
    shapes = shapes_of(config)
    measured = {(name, route.name): list[float]() for name in shapes for route in ROUTES}
    copied, small = 0.0, float("inf")
    for index in range(keys.rounds):
        for route in ROUTES[:: -1 if index % 2 else 1]:
            with route.context():
                for name, shape in shapes.items():
                    rate = measure_peak_flops(CPU, route.dtype, shape, route.product, now)
                    measured[name, route.name].append(rate)
        copied, small = max(copied, copy_rate(CPU)), min(small, small_operation())
    rates = {which: max(each) for which, each in measured.items()}
    products: list[list[Cell]] = [
        [name, *shape, *(rates[name, route.name] / 1e9 for route in ROUTES)] for name, shape in shapes.items()
    ]
    checked = max(shapes.values(), key=lambda shape: shape[1])
    routes: list[list[Cell]] = [
        [route.name, max(rates[name, route.name] for name in shapes) / 1e9, error(route, checked)] for route in ROUTES
    ]
    others: list[list[Cell]] = [["copy, GB/s read and written", copied / 1e9], ["one small operation, µs", small * 1e6]]
    chosen, narrow = float32_products.choose(), bfloat16_products.choose()
    return Results(
        [
            ResultTable(["product, GFLOP/s", "M", "K", "N", *(route.name for route in ROUTES)], products),
            ResultTable(["route", "GFLOP/s", "largest error ÷ largest result"], routes),
            ResultTable(["memory and calls", "measured"], others),
        ],
        [
            f"the best of {counted(keys.rounds, 'alternating round')}, {conditions()}; errors are those of "
            f"{checked[0]} × {checked[1]} × {checked[2]} against "
            "float64",
            least_steady({" by ".join(which): each for which, each in measured.items()}),
            str(chosen),
            str(narrow),
        ],
        {
            "bfloat16 GFLOP/s {}": float(routes[2 + narrow.widened][1] or 0),
            "float32 GFLOP/s {}": float(routes[chosen.onednn][1] or 0),
        },
    )


def parse(overrides: list[str]) -> tuple[Rounds, Config]:
    """`rounds=` and the overrides of `moe train`. Raises UserError."""
    keys, rest = split(overrides, Rounds(rounds=5), names=("rounds",))
    return keys, load_config([*DEFAULTS, *rest])


def shapes_of(config: Config) -> dict[str, tuple[int, int, int]]:
    """{product: (rows, length of a dot product, columns)} of a step's forward pass, and of a large square."""
    model, train = config.model, config.train
    tokens, hidden = train.micro_batch_size * train.sequence_length, model.hidden_size
    queries, keys = (heads * model.head_size for heads in (model.num_attention_heads, model.num_key_value_heads))
    shapes = {
        "queries, keys, values": (tokens, hidden, queries + 2 * keys),
        "attention's output": (tokens, queries, hidden),
    }
    if model.mlp is Mlp.sparse:
        rows = max(1, round(tokens * config.router.experts_per_token / config.router.num_experts))
        shapes |= {
            "an expert's gate and up": (rows, hidden, 2 * model.expert_size),
            "an expert's down": (rows, model.expert_size, hidden),
        }
    else:
        shapes |= {
            "gate, up": (tokens, hidden, model.intermediate_size),
            "down": (tokens, model.intermediate_size, hidden),
        }
    shapes["head, a slice of tokens"] = (min(tokens, slice_rows("cpu", model.vocab_size)), hidden, model.vocab_size)
    return shapes | {"large square": (SQUARE, SQUARE, SQUARE)}


def error(route: ProductRoute, shape: tuple[int, int, int]) -> float:
    """`largest_error` of a product, against float64."""
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, inner, generator=generator) for size in (rows, columns))
    exact = a.double() @ b.double().t()
    with route.context():
        product = route.product(a.to(route.dtype), b.to(route.dtype).t())
    return float32_products.largest_error(product, exact)


def copy_rate(device: torch.device, attempts: int = 4) -> float:
    """Bytes a second of a large copy, read and written both counted; the best of `attempts`."""
    source = torch.ones(COPIED // 4, device=device)
    target, best = torch.empty_like(source), 0.0
    read = now if device.type == "cpu" else time.perf_counter
    for _ in range(attempts):
        start = read()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * source.nbytes / (read() - start))
    return best


def small_operation() -> float:
    """Seconds of one addition of two numbers: what every operation costs at least."""
    one, out = torch.ones(1), torch.empty(1)
    start = now()
    for _ in range(SMALL_CALLS):
        torch.add(one, one, out=out)
    return (now() - start) / SMALL_CALLS
