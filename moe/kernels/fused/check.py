"""Runs every kernel once on a GPU, beside the plain code."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe.kernels import grouped_swiglu, permute
from moe.kernels import swiglu as plain_swiglu
from moe.kernels.fused import rows, swiglu
from moe.kernels.permute import RowOrder
from moe.kernels.policy import plain_kernels

# Of the largest result. Both compute in float32 and round once, the plain SwiGLU's forward pass once more.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}


class Pair(NamedTuple):
    """A kernel and the plain code for it. `moved` are the bytes that the kernel reads and writes."""

    name: str
    moved: int
    fused: Callable[[], tuple[Tensor, ...]]
    plain: Callable[[], tuple[Tensor, ...]]


def find_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """The first kernel that can't be compiled or run here, or is wrong, as text for the log; None if all are right."""
    for name, _, fused, plain in (*pairs(device, dtype), *pairs(device, dtype, ragged=True)):
        try:
            found = fused()
            found[0].sum().item()  # waits, so that a fault on the device is raised here
        except Exception as error:  # of many types, from the compiler, its linker and the driver
            return f"{name} failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        with plain_kernels():
            wanted = plain()
        error = max(relative_error(mine, other) for mine, other in zip(found, wanted, strict=True))
        if not error <= TOLERANCES[dtype]:
            return f"{name} is wrong by {error:.1e} of its largest result"
    return None


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value; NaN is infinite."""
    difference = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-30)
    return float(difference.nan_to_num(nan=float("inf")))


def pairs(
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokens: int = 37,
    choices: int = 3,
    hidden: int = 136,
    width: int = 1160,  # one full block and a part of one
    ragged: bool = False,
    in_place: bool = False,
) -> list[Pair]:
    """Every kernel at one shape: `tokens` with `choices` each, rows of `hidden`, an expert's of `width`; with `ragged`,
    only those whose tokens may have fewer choices.

    With `in_place`, for timing, those that overwrite an input get it itself, else a copy, so that results are equal.
    """
    own = (lambda x: x) if in_place else Tensor.clone
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    order = _order(tokens, choices, ragged, generator)
    y_NH, dy_TH = random(order.tokens_N.numel(), hidden), random(tokens, hidden)
    weights_TK = torch.rand(tokens, choices, generator=generator, device=device)
    if order.filled_TK is not None:
        weights_TK = weights_TK * order.filled_TK
    indices = order.rows_TK, order.filled_TK
    moved = [
        Pair(
            "combine",
            _bytes(y_NH, dy_TH, weights_TK, order.rows_TK),
            lambda: (rows.sum_rows(y_NH, indices[0], weights_TK, indices[1]),),
            lambda: (permute.sum_rows(y_NH, order, weights_TK),),
        ),
        Pair(
            "gather backward",
            _bytes(y_NH, dy_TH, order.rows_TK),
            lambda: (rows.sum_rows(y_NH, indices[0], None, indices[1]),),
            lambda: (permute.sum_rows(y_NH, order, None),),
        ),
        Pair(
            "combine backward",
            _bytes(dy_TH, y_NH, y_NH, weights_TK, weights_TK, order.rows_TK),
            lambda: _masked(rows.combine_backward(dy_TH, y_NH, weights_TK, *indices), indices[1]),
            lambda: _masked(permute.combine_backward(dy_TH, y_NH, weights_TK, order), indices[1]),
        ),
    ]
    if ragged:
        return moved
    gate_up_NG, dact_NF = random(tokens * choices, 2 * width), random(tokens * choices, width)
    gate_NF, up_NF = gate_up_NG.chunk(2, dim=1)
    counts, grad_EWH = [0, 5, 0, 1], random(4, width, hidden)
    counts_E = torch.tensor(counts, device=device)
    return [
        Pair(
            "SwiGLU",
            _bytes(gate_up_NG, dact_NF),
            lambda: (swiglu.swiglu(gate_NF, up_NF),),
            lambda: (plain_swiglu.activation(gate_NF, up_NF),),
        ),
        Pair(
            "SwiGLU backward and activation",
            _bytes(gate_up_NG, gate_up_NG, dact_NF, dact_NF),
            lambda: swiglu.activation_backward(gate_up_NG, own(dact_NF)),
            lambda: grouped_swiglu.activation_backward(gate_up_NG, own(dact_NF)),
        ),
        Pair(
            "SwiGLU backward",
            _bytes(gate_up_NG, gate_up_NG, dact_NF),
            lambda: swiglu.swiglu_backward(gate_NF, up_NF, dact_NF),
            lambda: plain_swiglu.swiglu_backward(gate_NF, up_NF, dact_NF),
        ),
        *moved,
        Pair(
            "zeros of idle experts",
            _bytes(grad_EWH[:2]),
            lambda: _zeroed(own(grad_EWH), counts_E),
            lambda: _zeroed(own(grad_EWH), counts),
        ),
    ]


def _bytes(*tensors: Tensor) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def _order(tokens: int, choices: int, ragged: bool, generator: torch.Generator) -> RowOrder:
    """Rows in random order; with `ragged` about half the places have a choice."""
    device = generator.device
    filled_TK = torch.rand(tokens, choices, generator=generator, device=device) < (0.5 if ragged else 2)
    places_N = filled_TK.flatten().nonzero().squeeze(1)
    places_N = places_N[torch.randperm(places_N.numel(), generator=generator, device=device)]
    rows_TK = torch.zeros(tokens * choices, dtype=torch.int64, device=device)
    rows_TK[places_N] = torch.arange(places_N.numel(), device=device)
    counts_E = torch.tensor([places_N.numel()], device=device)
    return RowOrder(
        places_N // choices, places_N, rows_TK.view(tokens, choices), counts_E, filled_TK if ragged else None
    )


def _masked(grads: tuple[Tensor, Tensor], filled_TK: Tensor | None) -> tuple[Tensor, ...]:
    """A weight's gradient where there is no choice has no meaning."""
    drows_NH, dweights_TK = grads
    return drows_NH, dweights_TK if filled_TK is None else dweights_TK * filled_TK


def _zeroed(grad_EWH: Tensor, counts: Tensor | list[int]) -> tuple[Tensor]:
    grouped_swiglu.zero_idle(counts, grad_EWH)
    return (grad_EWH,)
