"""The sparse layer's kernels with their references, for `moe bench kernels`.

Legend: T tokens, K choices of a token, N = T·K rows, H hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from moe.bench.kernel_case import Case, Side
from moe.kernels.expert_backends import resolve_backend
from moe.kernels.grouped_swiglu import grouped_ffn, loop_ffn
from moe.kernels.permute import (
    Combination,
    combine_rows,
    combine_rows_reference,
    gather_rows,
    gather_rows_reference,
)
from moe.sparse.balance import max_violation
from moe.sparse.dispatch import sort_by_expert
from moe.sparse.routers.base import Choices, count_choices


def sparse_cases(
    routing: str, choices: Choices, experts: Any, peers: Mapping[str, Any], x_BSH: Tensor
) -> Iterator[Case]:
    """Sort, gather, experts, combine: each, and all of it beside the modules of `peers`."""
    top_k = choices.per_token
    assert top_k is not None
    counts_E = count_choices(choices.experts_N, len(experts.gate_up_proj))
    counts, violation = counts_E.tolist(), float(max_violation(counts_E))
    x_TH, (order, _) = x_BSH.flatten(0, 1).requires_grad_(), sort_by_expert(choices, counts_E)
    rows_NH = x_TH.detach()[order.tokens_N].requires_grad_()
    ids_TK = choices.experts_N.view(-1, top_k)
    weights_TK = choices.weights_N.detach().view(-1, top_k).clone().requires_grad_()
    gate_up, down = experts.gate_up_proj, experts.down_proj
    backend, _ = resolve_backend(experts.config, x_TH.device, x_TH.dtype, (down.shape[1], down.shape[2]))
    flops = 6.0 * len(rows_NH) * (gate_up.numel() + down.numel()) / len(gate_up)

    def sort() -> list[Tensor]:
        now, _ = sort_by_expert(choices, counts_E)
        return [now.tokens_N, now.places_N, now.rows_TK]

    yield Case(f"sort, {routing}", {"ours": Side(sort)}, bytes=8 * 5 * len(rows_NH), max_violation=violation)
    yield Case(
        f"gather, {routing}",
        {
            "ours": Side(lambda: [gather_rows(x_TH, order)], [x_TH]),
            "PyTorch": Side(lambda: [gather_rows_reference(x_TH, order)], [x_TH]),
        },
        bytes=2 * x_TH.element_size() * (x_TH.numel() + rows_NH.numel()),
        max_violation=violation,
    )
    leaves = [rows_NH, gate_up, down]
    yield Case(
        f"experts, {routing}",
        {
            "ours": Side(lambda: [grouped_ffn(rows_NH, counts_E, gate_up, down, backend)], leaves),
            "PyTorch": Side(lambda: [loop_ffn(rows_NH, counts, gate_up, down)], leaves),
        },
        flops=flops,
        max_violation=violation,
    )
    yield Case(
        f"combine, {routing}",
        {
            "ours": Side(lambda: [combine_rows(rows_NH, weights_TK, order)], [rows_NH, weights_TK]),
            "PyTorch": Side(lambda: [combine_rows_reference(rows_NH, weights_TK, order)], [rows_NH, weights_TK]),
        },
        max_violation=violation,
    )

    def whole() -> list[Tensor]:
        now, placed_TK = sort_by_expert(Choices.top_k(ids_TK, weights_TK), counts_E)
        combination = Combination(placed_TK if experts.sums else None, now)  # as the layer does
        y = grouped_ffn(x_TH, counts_E, gate_up, down, backend, combination)
        return [y if experts.sums else combine_rows(y, placed_TK, now)]

    def reference() -> list[Tensor]:
        now, placed_TK = sort_by_expert(Choices.top_k(ids_TK, weights_TK), counts_E)
        y_NH = loop_ffn(gather_rows_reference(x_TH, now), counts, gate_up, down)
        return [combine_rows_reference(y_NH, placed_TK, now)]

    leaves = [x_TH, weights_TK, gate_up, down]
    sides = {"ours": Side(whole, leaves), "PyTorch": Side(reference, leaves)}
    sides |= {name: _peers_experts(peer, x_TH, ids_TK, weights_TK) for name, peer in peers.items()}
    yield Case(f"sort to combine, {routing}", sides, flops=flops, max_violation=violation)


def _peers_experts(experts: Any, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Side:
    leaves = [x_TH, weights_TK, experts.gate_up_proj, experts.down_proj]
    return Side(lambda: [experts(x_TH, ids_TK, weights_TK)], leaves)
