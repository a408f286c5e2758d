"""Every kernel and the plain code for it, on the same random inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe.kernels import cross_entropy as plain_cross_entropy
from moe.kernels import expert_swiglu, float8_products, permute
from moe.kernels import rotary as plain_rotary
from moe.kernels import swiglu as plain_swiglu
from moe.kernels.fused import cross_entropy, float8, gemm, rotary, rows, swiglu
from moe.kernels.grouped_products import per_expert_products
from moe.kernels.permute import RowOrder

IGNORED = plain_cross_entropy.IGNORED


class Pair(NamedTuple):
    """A kernel and the plain code for it. `moved` are the bytes that the kernel reads and writes, `flops` what it
    computes, where that is what takes its time."""

    name: str
    moved: int
    fused: Callable[[], tuple[Tensor, ...]]
    plain: Callable[[], tuple[Tensor, ...]]
    flops: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """By default a full block and a part of one in each kernel."""

    tokens: int = 13
    choices: int = 3
    hidden: int = 530
    width: int = 1160  # of an expert: F
    vocab: int = 4100
    heads: int = 21
    head_dim: int = 80
    experts: int = 5


MIXTRAL = Sizes(tokens=8192, choices=2, hidden=4096, width=14336, vocab=32000, heads=40, head_dim=128, experts=8)


class Inputs:
    """Random tensors of one device and dtype. With `in_place`, for timing, code that overwrites an input gets it
    itself, else a copy, so that the plain code has the same one."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, in_place: bool) -> None:
        self.device, self.dtype, self.in_place = device, dtype, in_place
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def own(self, x: Tensor) -> Tensor:
        return x if self.in_place else x.clone()


def pairs(device: torch.device, dtype: torch.dtype, shape: Sizes, *, in_place: bool = False) -> Iterator[Pair]:
    """Every kernel; of those that move rows, also the case of tokens that have fewer choices than others."""
    inputs = Inputs(device, dtype, in_place=in_place)
    yield from _swiglu(inputs, shape)
    yield from _rows(inputs, shape, ragged=False)
    yield from _rows(inputs, shape, ragged=True)
    yield _idle(inputs, shape)
    yield _cross_entropy(inputs, shape)
    yield from _rotary(inputs, shape)


def _swiglu(inputs: Inputs, shape: Sizes) -> Iterator[Pair]:
    count = shape.tokens * shape.choices
    gate_up_NG, dact_NF = inputs.normal(count, 2 * shape.width), inputs.normal(count, shape.width)
    gate_NF, up_NF = gate_up_NG.chunk(2, dim=1)
    yield Pair(
        "SwiGLU",
        _bytes(gate_up_NG, dact_NF),
        lambda: (swiglu.swiglu(gate_NF, up_NF),),
        lambda: (plain_swiglu.activation(gate_NF, up_NF),),
    )
    yield Pair(
        "experts' SwiGLU backward",  # recomputes the activation too
        _bytes(gate_up_NG, gate_up_NG, dact_NF, dact_NF),
        lambda: swiglu.activation_backward(gate_up_NG, inputs.own(dact_NF))[:2],
        lambda: plain_swiglu.activation_backward(gate_up_NG, inputs.own(dact_NF))[:2],
    )
    weights_N = inputs.uniform(count)
    yield Pair(
        "experts' SwiGLU backward, weighted",  # the weights' gradients too
        _bytes(gate_up_NG, gate_up_NG, dact_NF, dact_NF),
        lambda: _known(swiglu.activation_backward(gate_up_NG, inputs.own(dact_NF), weights_N)),
        lambda: _known(plain_swiglu.activation_backward(gate_up_NG, inputs.own(dact_NF), weights_N)),
    )
    yield Pair(
        "dense SwiGLU backward",
        _bytes(gate_up_NG, gate_up_NG, dact_NF),
        lambda: swiglu.swiglu_backward(gate_NF, up_NF, dact_NF),
        lambda: plain_swiglu.swiglu_backward(gate_NF, up_NF, dact_NF),
    )


def _known(found: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(one for one in found if one is not None)


def _rows(inputs: Inputs, shape: Sizes, *, ragged: bool) -> Iterator[Pair]:
    order = _order(inputs, shape, ragged=ragged)
    y_NH, dy_TH = inputs.normal(order.tokens_N.numel(), shape.hidden), inputs.normal(shape.tokens, shape.hidden)
    weights_TK, filled_TK = inputs.uniform(shape.tokens, shape.choices), order.filled_TK
    if filled_TK is not None:
        weights_TK = weights_TK * filled_TK
    small, suffix = _bytes(weights_TK, order.rows_TK), ", ragged" * ragged
    yield Pair(
        f"combine{suffix}",
        _bytes(y_NH, dy_TH) + small,
        lambda: (rows.sum_rows(y_NH, order.rows_TK, weights_TK, filled_TK),),
        lambda: (permute.sum_rows(y_NH, order, weights_TK),),
    )
    yield Pair(
        f"gather backward{suffix}",
        _bytes(y_NH, dy_TH, order.rows_TK),
        lambda: (rows.sum_rows(y_NH, order.rows_TK, None, filled_TK),),
        lambda: (permute.sum_rows(y_NH, order, None),),
    )
    yield Pair(
        f"combine backward{suffix}",
        _bytes(dy_TH, y_NH, y_NH, weights_TK) + small,
        lambda: _with_meaning(rows.combine_backward(dy_TH, y_NH, weights_TK, order.rows_TK, filled_TK), order),
        lambda: _with_meaning(permute.combine_backward(dy_TH, y_NH, weights_TK, order), order),
    )


def _order(inputs: Inputs, shape: Sizes, *, ragged: bool) -> RowOrder:
    """Rows in random order; with `ragged` about half the places have a choice."""
    filled_TK = inputs.uniform(shape.tokens, shape.choices) < (0.5 if ragged else 2.0)
    places_N = filled_TK.flatten().nonzero().squeeze(1)
    places_N = places_N[torch.randperm(places_N.numel(), generator=inputs.generator, device=inputs.device)]
    rows_TK = torch.zeros_like(filled_TK, dtype=torch.int64)
    rows_TK.view(-1)[places_N] = torch.arange(places_N.numel(), device=inputs.device)
    counts_E = torch.tensor([places_N.numel()], device=inputs.device)
    return RowOrder(places_N // shape.choices, places_N, rows_TK, counts_E, filled_TK if ragged else None)


def _with_meaning(grads: tuple[Tensor, Tensor], order: RowOrder) -> tuple[Tensor, Tensor]:
    """A weight's gradient where there is no choice has none."""
    drows_NH, dweights_TK = grads
    return drows_NH, dweights_TK if order.filled_TK is None else dweights_TK * order.filled_TK


def _idle(inputs: Inputs, shape: Sizes) -> Pair:
    counts, grad_EFH = [0, 5, 0, 1], inputs.normal(4, shape.width, shape.hidden)
    counts_E = torch.tensor(counts, device=inputs.device)

    def zeroed(counts: Tensor | list[int]) -> tuple[Tensor]:
        grad = inputs.own(grad_EFH)
        expert_swiglu.zero_idle(counts, grad)
        return (grad,)

    moved = _bytes(grad_EFH[:2])
    return Pair("zeros of 2 idle experts", moved, lambda: zeroed(counts_E), lambda: zeroed(counts))


def _cross_entropy(inputs: Inputs, shape: Sizes) -> Pair:
    logits_TV, labels_T = inputs.normal(shape.tokens, shape.vocab), torch.arange(shape.tokens, device=inputs.device)
    labels_T %= shape.vocab
    labels_T[::3] = IGNORED

    def fused() -> tuple[Tensor, Tensor]:
        logits = inputs.own(logits_TV)
        return cross_entropy.to_gradient(logits, labels_T, IGNORED, True), logits

    def plain() -> tuple[Tensor, Tensor]:
        logits = inputs.own(logits_TV)
        return plain_cross_entropy.to_gradient(logits, labels_T, True), logits

    return Pair("cross-entropy and its gradient", _bytes(logits_TV, logits_TV, logits_TV), fused, plain)


def _rotary(inputs: Inputs, shape: Sizes) -> Iterator[Pair]:
    x_BSND = inputs.normal(1, shape.tokens, shape.heads + 8, shape.head_dim)[:, :, : shape.heads]
    table = plain_rotary.rotary_table(1, shape.tokens, shape.head_dim, 1e4, inputs.device, inputs.dtype)

    def rotated(back: bool) -> tuple[Tensor]:
        return (rotary.rotate(x_BSND, table.cos_S1D, table.sin_S1D, torch.empty_like(x_BSND), back=back),)

    moved = _bytes(x_BSND, x_BSND, table.cos_S1D)
    yield Pair("rotation", moved, lambda: rotated(False), lambda: (plain_rotary.rotate(x_BSND, table),))
    yield Pair("rotation back", moved, lambda: rotated(True), lambda: (plain_rotary.rotate(x_BSND, table, back=True),))


def float8_pairs(device: torch.device, dtype: torch.dtype, shape: Sizes) -> Iterator[Pair]:
    """The kernel of `experts.fp8`, apart: GPUs of compute capability 8.0 and 8.6, which run the others, have no such
    numbers. Results are in float32."""
    weight_EFH = Inputs(device, dtype, in_place=False).normal(2, shape.width, shape.hidden)
    for name, x_BVK in (("rows", weight_EFH), ("columns", weight_EFH.transpose(1, 2))):
        yield Pair(
            f"float8 of {name}",
            _bytes(weight_EFH) + weight_EFH.numel(),
            lambda x_BVK=x_BVK: tuple(each.float() for each in float8.quantize(x_BVK)),
            lambda x_BVK=x_BVK: tuple(each.float() for each in float8_products.quantize(x_BVK)),
        )


def gemm_pairs(device: torch.device, dtype: torch.dtype, shape: Sizes) -> Iterator[Pair]:
    """The grouped products, with each class of tiles, apart: they are a back-end of the experts, and need more shared
    memory than the other kernels. One expert has half of the rows and one has none."""
    inputs, rows = Inputs(device, dtype, in_place=False), shape.tokens * shape.choices
    few = rows // (2 * shape.experts)
    counts = [rows - few * (shape.experts - 2), 0, *[few] * (shape.experts - 2)]
    counts_E = torch.tensor(counts, device=device)
    rows_NH, rows_NF = inputs.normal(rows, shape.hidden), inputs.normal(rows, shape.width)
    weight_EFH, plain = inputs.normal(shape.experts, shape.width, shape.hidden), per_expert_products(counts)
    flops, moved = 2 * rows * shape.hidden * shape.width, _bytes(rows_NH, rows_NF, weight_EFH)
    for size in ("many", "few"):
        mine = gemm.triton_products(counts_E, size)
        for name, left, right, fused_product, plain_product in (
            ("rows × weightᵀ", rows_NH, weight_EFH, mine.times_weight_t, plain.times_weight_t),
            ("rows × weight", rows_NF, weight_EFH, mine.times_weight, plain.times_weight),
            ("rowsᵀ × rows", rows_NF, rows_NH, mine.outer, plain.outer),
        ):
            yield Pair(
                f"{name}, tiles for {size} rows",
                moved,
                lambda product=fused_product, left=left, right=right: (product(left, right),),
                lambda product=plain_product, left=left, right=right: (product(left, right),),
                flops,
            )


def _bytes(*tensors: Tensor) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)
