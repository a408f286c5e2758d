"""What `experts.two_batch_overlap` computes while rows travel, and what it can be combined with. That losses and
gradients are those without it: tests/distributed/test_engine.py."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from moe.config.compose import load_config
from moe.model.attention import Attention
from moe.sparse.dispatch import _Transfer
from moe.sparse.experts import Experts
from moe.train.profile import PartRanges, attributed, in_part, times_by_part
from tests.distributed.training import build, config_of, engine_steps
from tests.ranks import run_ranks

ONE_STEP = ["parallel.expert_parallel_size=2", "train.global_batch_size=4"]  # one micro-batch of two rows on each rank


def _events(overrides: list[str]) -> list[str]:
    """What one step computes, and the exchanges (by number) that it starts and waits for, in order."""
    config, events, numbers = config_of([*ONE_STEP, *overrides]), [], dict[int, int]()
    attend, compute, start, wait = Attention.forward, Experts.forward, _Transfer.start, _Transfer.wait

    def attending(module: Attention, *inputs: Any) -> Tensor:
        out = attend(module, *inputs)
        events.append("attention")
        out.register_hook(lambda grad: events.append("attention's backward"))
        return out

    def computing(module: Experts, *inputs: Any) -> Tensor:
        events.append("experts")
        return compute(module, *inputs)

    def starting(transfer: _Transfer, *inputs: Any) -> Tensor:
        events.append(f"start {numbers.setdefault(id(transfer), len(numbers))}")
        kept.append(transfer)
        return start(transfer, *inputs)

    def waiting(transfer: _Transfer) -> Tensor:
        events.append(f"wait {numbers[id(transfer)]}")
        return wait(transfer)

    kept: list[_Transfer] = []
    mesh, engine = build(config, [])
    with (
        patch.object(Attention, "forward", attending), patch.object(Experts, "forward", computing),
        patch.object(_Transfer, "start", starting), patch.object(_Transfer, "wait", waiting),
    ):  # fmt: skip
        engine_steps(config, mesh, engine, 0, 1)
    return events


def _between(events: list[str], first: str, last: str) -> list[str]:
    return events[events.index(first) + 1 : events.index(last)]


def test_rows_travel_while_the_other_half_is_computed() -> None:
    for events in run_ranks(2, _events, ["experts.two_batch_overlap=true"], timeout=120):
        # halves A and B of two layers: 0 rows of A, 1 rows of B, 2 results of A, 3 results of B
        assert events[:19] == [
            "attention", "start 0", "attention", "start 1",
            "wait 0", "experts", "start 2", "wait 1", "experts", "start 3",
            "wait 2", "attention", "start 4", "wait 3", "attention", "start 5", "wait 4", "experts", "start 6",
        ]  # fmt: skip
        backward = events[events.index("start 7") + 3 :]  # after waiting for 6 and 7
        assert sorted(event for event in backward if "wait" in event) == [f"wait {number}" for number in range(8)]
        # The gradients of B's results in the first layer travel while A's attention in the second is differentiated,
        # those of A's rows in the first while B's attention there is.
        assert "attention's backward" in _between(backward, "start 3", "wait 3")
        assert "attention's backward" in _between(backward, "start 0", "wait 0")


def _parts(overrides: list[str]) -> tuple[set[str], Counter[str]]:
    """(the parts that have time, the number of the host's operations by part) in the second of two steps."""
    config = config_of([*ONE_STEP, *overrides])
    mesh, engine = build(config, [])
    engine_steps(config, mesh, engine, 0, 1)
    ranges = PartRanges(engine)
    with profile(activities=[ProfilerActivity.CPU]) as recorded, in_part("other"):
        engine_steps(config, mesh, engine, 1, 2)
    ranges.remove()
    assert not any("dispatch" in vars(module) for module in engine.model.modules())
    events = recorded.events() or []
    return set(times_by_part(events).host), Counter(part for _, part, _ in attributed(events))


def test_a_profile_has_the_parts_that_it_has_without() -> None:
    (parts, with_it), (parts_without, without) = (
        run_ranks(2, _parts, [f"experts.two_batch_overlap={state}"], timeout=120)[0] for state in ("true", "false")
    )
    assert parts == parts_without
    assert with_it["dispatch"] > 1.5 * without["dispatch"]  # each half is sorted, gathered and combined
    assert with_it["other"] < 1.5 * without["other"]


def test_without_it_nothing_is_computed_while_rows_travel() -> None:
    for events in run_ranks(2, _events, [], timeout=120):
        assert events[:6] == ["attention", "start 0", "wait 0", "experts", "start 1", "wait 1"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.micro_batch_size=1"], r"must have train\.micro_batch_size ≥ 2, not 1"),
        (["model.recompute=mlp"], r"has no model\.recompute=mlp"),
    ],
)
def test_what_it_can_not_be_combined_with(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=rf"experts\.two_batch_overlap=true {message}"):
        load_config(["experts.two_batch_overlap=true", *overrides])
