"""Whose memory is given back: only the host's. What a step computes: tests/distributed/test_shortcuts.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe.engine.deepspeed import bfloat16_shortcuts
from moe.engine.deepspeed.bfloat16_shortcuts import BFloat16Shortcuts


class Zero:
    """The parts of BF16_Optimizer that are borrowed, with one parameter of 8 MiB of sums."""

    def __init__(self, device: str) -> None:
        total = torch.zeros(2 * 2**20, device=device)
        self.fp32_groups_gradients_flat = [total]
        self.fp32_groups_gradients = [[total]]
        self.fp32_groups_has_gradients = [[False]]
        self.immediate_grad_update = True

    def _update_hp_grad(self, lp: Any, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None: ...
    def clear_hp_grads(self) -> None: ...
    def get_grads_for_reduction(self) -> None: ...


@pytest.mark.parametrize(("device", "given_back"), [("cpu", ["trim", "release"]), ("meta", [])])
def test_only_the_hosts_memory_is_given_back(
    device: str, given_back: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor on `meta` stands for one on a GPU: neither has an address on the host."""
    called: list[str] = []
    heap = SimpleNamespace(trim=lambda: called.append("trim"), release=lambda _: called.append("release"))
    monkeypatch.setattr(bfloat16_shortcuts, "heap", heap)
    zero: Any = Zero(device)
    BFloat16Shortcuts(SimpleNamespace(), zero, world_size=2)
    gradient = torch.ones(2 * 2**20, dtype=torch.bfloat16, device=device)
    zero._update_hp_grad(SimpleNamespace(grad=gradient), 0, 0, False)
    assert zero.fp32_groups_has_gradients == [[True]]
    zero.clear_hp_grads()
    assert called == given_back
    assert zero.fp32_groups_has_gradients == [[False]]
