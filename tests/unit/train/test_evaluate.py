"""What an evaluation writes for the report."""

from __future__ import annotations

import torch

from moe.sparse.routers import Choices, RouterOutput
from moe.train.evaluate import _first_experts


def _routed(tokens: list[int], experts: list[int], count: int) -> RouterOutput:
    choices = Choices(torch.tensor(tokens).long(), torch.tensor(experts).long(), torch.ones(len(tokens)), count)
    nothing_TE = torch.zeros(count, 3)
    return RouterOutput(choices, nothing_TE, nothing_TE, torch.bincount(choices.experts_N, minlength=3), {}, {})


def test_a_tokens_first_row_is_its_first_expert_and_a_token_without_rows_has_none() -> None:
    routed = _routed([0, 0, 2, 3, 3, 3], [2, 1, 0, 1, 0, 2], 5)
    assert _first_experts(routed, 5) == [2, None, 0, 1, None]
    assert _first_experts(routed, 2) == [2, None]
    assert _first_experts(_routed([], [], 2), 2) == [None, None]
