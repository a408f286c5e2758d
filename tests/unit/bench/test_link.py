"""The law of a link's collectives: constants found in exact times, what is refused, and a step's time by hand."""

from __future__ import annotations

import math

import pytest

from moe.bench.link import SIZES, LinkLaw, LinkLaws, fit_link, parse_rate
from moe.config.compose import load_config
from moe.errors import UserError
from moe.plan import plan_traffic


@pytest.mark.parametrize(("latency", "bandwidth"), [(3e-4, 12.5e6), (5e-5, 4e10), (0.0, 1e6)])
def test_exact_times_give_the_constants(latency: float, bandwidth: float) -> None:
    law = fit_link({size: latency + size / bandwidth for size in SIZES}, in_turn=False)
    assert (law.latency, law.bandwidth) == pytest.approx((latency, bandwidth), rel=1e-6, abs=1e-12)
    assert law.both_ways == math.inf


def test_exact_times_of_calls_that_go_in_turn_give_the_bytes_that_go_both_ways() -> None:
    exact = LinkLaw(3e-4, 12e6, 500e3)
    law = fit_link({size: exact.seconds(size) for size in SIZES}, in_turn=True)
    assert (law.bandwidth, law.both_ways) == pytest.approx((12e6, 500e3), rel=0.03)  # a step of the search is 4 %
    assert all(law.seconds(size) == pytest.approx(exact.seconds(size), rel=0.01) for size in SIZES)


def test_calls_that_always_go_both_ways_are_found_to() -> None:
    exact = LinkLaw(3e-4, 12e6)
    law = fit_link({size: exact.seconds(size) for size in SIZES}, in_turn=True)
    assert all(law.seconds(size) == pytest.approx(exact.seconds(size), rel=1e-3) for size in SIZES)


def test_one_slow_call_moves_the_law_little() -> None:
    """A call of a busy machine that took twice as long, among six."""
    exact = LinkLaw(3e-4, 12e6)
    times = {size: exact.seconds(size) for size in SIZES}
    for size in SIZES[1:]:
        law = fit_link(times | {size: 2 * times[size]}, in_turn=False)
        assert 0.7 * 12e6 < law.bandwidth <= 12e6 * 1.001


def test_a_latency_below_zero_becomes_zero() -> None:
    law = fit_link({size: size / 12e6 * (0.5 if size == SIZES[0] else 1) for size in SIZES}, in_turn=False)
    assert law.latency == 0
    assert law.bandwidth > 12e6


@pytest.mark.parametrize(("in_turn", "sizes"), [(False, 2), (True, 3)])
def test_too_few_sizes_are_refused(in_turn: bool, sizes: int) -> None:
    with pytest.raises(
        ValueError, match=f"with {sizes} constants needs {sizes + 1} sizes of calls or more, not {sizes}"
    ):
        fit_link({size: size / 1e6 for size in SIZES[:sizes]}, in_turn=in_turn)


def test_times_that_do_not_grow_are_refused() -> None:
    with pytest.raises(ValueError, match="calls of more bytes took no longer"):
        fit_link({size: 1 / size for size in SIZES}, in_turn=False)


def test_rates_are_tcs() -> None:
    assert [parse_rate(text) for text in ("8bit", "16kbit", "100mbit", "2.5gbit")] == [1, 2e3, 12.5e6, 312.5e6]


@pytest.mark.parametrize("text", ["", "fast", "100", "0mbit", "100mbps", "1e3bit", "-1mbit"])
def test_other_rates_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=rf"^rate={text} must be the link's rate"):
        parse_rate(text)


def test_a_steps_time_by_hand() -> None:
    """Two ranks, one layer, one micro-batch: a call has 2 · 64 tokens' 2 rows of 32 float32 numbers and sends half."""
    shape = ["model=tiny", "model.hidden_size=32", "model.num_hidden_layers=1", "parallel.expert_parallel_size=2"]
    batch = ["train.micro_batch_size=2", "train.global_batch_size=4", "train.sequence_length=64"]
    config = load_config([*shape, *batch])
    rows, counts = 2 * 64 * 2 * 32 * 4 / 2, 8 * 8 / 2
    exchange, reduce = LinkLaw(1e-3, 1e6, 10_000), LinkLaw(2e-3, 2e6)
    laws = LinkLaws(
        {
            "all-to-all": {size: [exchange.seconds(size)] for size in SIZES},
            "all-reduce": {size: [reduce.seconds(size)] for size in SIZES},
        }
    )
    expected = 4 * (1e-3 + (2 * rows - 10_000) / 1e6) + 1e-3 + counts / 1e6
    flows = plan_traffic(config, 1, 2)
    reduced = flows["shared gradients"].total + flows["shared weights"].total  # each expert is on one rank
    assert laws.planned_seconds(config, 2) == pytest.approx(expected + 2e-3 + reduced / 2e6, rel=0.01)
