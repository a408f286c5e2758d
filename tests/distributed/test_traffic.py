"""The bytes that the expert exchange sends, counted in its real all-to-all calls, equal the plan's formula."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moe.plan import exchange_bytes
from tests.distributed.training import build, config_of, engine_steps
from tests.ranks import run_ranks


def _sent(overrides: list[str]) -> tuple[list[int], list[int]]:
    """[bytes, calls] of (rows, counts) that this rank gave to all-to-all in one optimizer step, its part to itself
    included."""
    config = config_of(overrides)
    mesh, engine = build(config)
    rows, counts, real = [0, 0], [0, 0], dist.all_to_all_single

    def counting(output: torch.Tensor, given: torch.Tensor, *arguments: object, **keywords: object) -> object:
        kind = rows if given.is_floating_point() else counts
        kind[0] += given.nbytes
        kind[1] += 1
        return real(output, given, *arguments, **keywords)

    dist.all_to_all_single = counting
    try:
        engine_steps(config, mesh, engine, 0, 1)
    finally:
        dist.all_to_all_single = real
    return rows, counts


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["model.recompute=block", "experts.exchange_chunks=2"],
        ["router.top_k=3", "train.micro_batch_size=1"],
        ["experts.two_batch_overlap=true", "experts.exchange_chunks=2"],
    ],
    ids=["top-2", "recompute, two chunks", "top-3", "two-batch overlap, two chunks"],
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_sent_and_calls_equal_the_formula(ranks: int, more: list[str]) -> None:
    overrides = [f"parallel.expert_parallel_size={ranks}", *more]
    sent = run_ranks(ranks, _sent, overrides)
    planned = exchange_bytes(config_of(overrides), ranks)
    # Summed over ranks, since what one rank returns depends on the tokens that were routed to it.
    assert sum(rows[0] for rows, _ in sent) == ranks * planned.rows
    assert sum(counts[0] for _, counts in sent) == ranks * planned.counts
    assert {(rows[1], counts[1]) for rows, counts in sent} == {(planned.row_calls, planned.count_calls)}
