"""The best evaluation so far."""

import math

import pytest

from moe.checkpoint.state import TrainState
from moe.config import AnswerMetric, CheckpointConfig
from moe.config.compose import load_config
from moe.errors import UserError
from moe.train.best import Best


@pytest.mark.parametrize("unusable", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_never_the_best(unusable):
    for greater in (False, True):
        state = TrainState()
        best = Best(
            CheckpointConfig(metric_for_best_model="score", greater_is_better=greater, early_stopping_patience=1), state
        )
        assert not best.judge({"score": unusable})
        assert state.best == {}
        assert not best.stops
        assert best.judge({"score": 2.0})
        assert not best.judge({"score": unusable})
        assert state.best["value"] == 2.0
        assert best.stops


@pytest.mark.parametrize("metric", [one.name for one in AnswerMetric])
def test_of_answers_the_smallest_share_is_never_the_best(metric):
    stated = [f"checkpoint.metric_for_best_model={metric}"]
    load_config([*stated, "checkpoint.greater_is_better=true"])
    with pytest.raises(UserError, match=f"metric_for_best_model={metric} .* set checkpoint.greater_is_better=true"):
        load_config(stated)
    CheckpointConfig(metric_for_best_model=metric)  # a saved one is still read
