"""What all benchmarks say of their rounds, and what they refuse to time."""

from __future__ import annotations

import re

import pytest
import torch

from moe.bench.clock import conditions
from moe.bench.peers import OurStep, parse
from moe.bench.settings import least_steady, load, spread
from moe.bench.stepper import Stepper
from moe.distributed import rendezvous
from tests.ranks import run_ranks
from tests.unit.bench.test_peers import SMALL


def test_the_load_of_the_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (1.26, 5.0, 9.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert load() == "load 1.3"
    assert conditions() == "wall-clock, 2 threads, load 1.3"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert conditions() == "CPU time, 1 thread, load 1.3"
    assert conditions("wall-clock", 2) == "wall-clock, 2 ranks of 1 thread, load 1.3"


def test_rounds_that_disagree_are_a_warning() -> None:
    assert spread([1.0, 1.4]) == "1.00 to 1.40"
    assert spread([1.0, 1.6]) == "1.00 to 1.60; the rounds disagree: the machine is busy"
    rounds = {"steady": [10.0, 11.0, 10.0], "not": [1.0, 2.0, 4.0]}
    assert (
        least_steady(rounds) == "rounds of not ÷ their median: 0.50 to 2.00; the rounds disagree: the machine is busy"
    )
    assert least_steady({"steady": rounds["steady"]}) == "rounds of steady ÷ their median: 1.00 to 1.10"


def _skip(engine: str) -> None:
    _, config = parse([*SMALL, f"engine={engine}"])
    mesh = rendezvous.start(1)
    try:
        step = Stepper(config, mesh)
        assert step().result.skipped is None
        ours = OurStep(step.engine, config)
        ids_BS = torch.zeros(2, 16, dtype=torch.int64)
        ours(ids_BS)
        with torch.no_grad():
            step.engine.model.get_parameter("lm_head.weight")[0, 0] = torch.nan
        skipped = re.escape("step 1 was skipped (not finite): its time would say nothing")
        with pytest.raises(RuntimeError, match=skipped):
            step()
        with pytest.raises(RuntimeError, match=skipped):
            ours(ids_BS)
    finally:
        rendezvous.stop()


@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_a_skipped_step_is_not_timed(engine: str) -> None:
    run_ranks(1, _skip, engine)
