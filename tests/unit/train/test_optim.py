"""The learning rate as a function of the step: warm-up, cosine, linear, warmup-stable-decay, constant."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from moe.config import OptimConfig, Schedule, TrainConfig
from moe.config.compose import load_config
from moe.errors import UserError
from moe.train.optim import learning_rate


def _rates(steps: int, **values: object) -> list[float]:
    optim = OptimConfig(lr=1.0, min_lr_ratio=0.1, **values)  # type: ignore[arg-type]
    config = replace(load_config([]), optim=optim, train=TrainConfig(steps=steps))
    return [learning_rate(config, step) for step in range(steps)]


def test_warm_up_is_linear_and_ends_at_lr() -> None:
    rates = _rates(100, warmup_steps=10)
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert max(rates) == rates[10] == 1.0


def test_cosine_ends_at_the_minimum_and_is_halfway_in_the_middle() -> None:
    rates = _rates(101, warmup_steps=0)
    assert rates[0] == 1.0
    assert rates[50] == pytest.approx(0.55)
    assert rates[25] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert rates[-1] == pytest.approx(0.1)


def test_linear_falls_by_the_same_amount_each_step() -> None:
    rates = _rates(101, warmup_steps=10, schedule=Schedule.linear)
    drops = [a - b for a, b in itertools.pairwise(rates[10:])]
    assert drops == pytest.approx([0.9 / 90] * 90)
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)


def test_warmup_stable_decay_is_flat_then_linear() -> None:
    rates = _rates(100, warmup_steps=10, schedule=Schedule.warmup_stable_decay, decay_steps=20)
    assert set(rates[10:80]) == {1.0}
    drops = [a - b for a, b in itertools.pairwise(rates[80:])]
    assert drops == pytest.approx([drops[0]] * len(drops))
    assert rates[-1] == pytest.approx(0.1)


def test_constant_stays() -> None:
    assert set(_rates(30, warmup_steps=5, schedule=Schedule.constant)[5:]) == {1.0}


@pytest.mark.parametrize("schedule", list(Schedule))
def test_one_step_runs(schedule: Schedule) -> None:
    assert 0 < _rates(1, warmup_steps=0, schedule=schedule)[0] <= 1.0


def test_the_default_warm_up_is_a_twentieth_of_the_steps() -> None:
    assert _rates(100)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert _rates(5)[0] == 1.0


def test_the_rate_is_in_inverse_proportion_to_the_width() -> None:
    overrides = ["optim.lr=8e-3", "optim.base_hidden_size=128", "optim.warmup_steps=0"]
    for width, rate in ((64, 1.6e-2), (128, 8e-3), (4096, 2.5e-4)):
        assert learning_rate(load_config([*overrides, f"model.hidden_size={width}"]), 0) == pytest.approx(rate)
    assert learning_rate(load_config(["optim.lr=8e-3", "model.hidden_size=64", "optim.warmup_steps=0"]), 0) == 8e-3


def test_a_rate_beyond_float32_is_refused() -> None:
    with pytest.raises(UserError, match=r"optim.lr=1e\+37 × optim.base_hidden_size=1000000 / model.hidden_size=128"):
        load_config(["optim.lr=1e37", "optim.base_hidden_size=1000000"])
