"""Forced-uniform routing, beside which benchmarks measure the routers' own.

Legend: N choices, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe.sparse.routers import RouterOutput, routers_of
from moe.sparse.routers.base import count_choices

OWN, UNIFORM = "own", "uniform"


def even_experts(choices: int, experts: int, device: torch.device) -> Tensor:
    """int64 [N]: each expert as often as the others; a token's neighbouring choices are different experts."""
    return torch.arange(choices, device=device) % experts


@contextmanager
def uniform_routing(model: nn.Module) -> Iterator[None]:
    """In it, `model`'s tokens go to experts in turn. Its routers compute as before: weights, losses and the time for
    them are their own. Every token must have the same number of choices."""
    handles = [router.register_forward_hook(_in_turn) for router in routers_of(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_turn(router: nn.Module, inputs: object, output: RouterOutput) -> RouterOutput:
    del router, inputs
    choices, experts = output.choices, len(output.counts_E)
    assert choices.per_token is not None
    even_N = even_experts(choices.experts_N.numel(), experts, choices.experts_N.device)
    return replace(output, choices=replace(choices, experts_N=even_N), counts_E=count_choices(even_N, experts))
