"""Which overrides a trial gets, and which spaces are refused before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest

from moe.config import Sampler, SweepSettings
from moe.config.compose import load_config
from moe.errors import UserError
from moe.sweep.definition import config_digest, define, differences, merged

PLAIN = ["engine=plain", "tracking=none"]


def _define(space: dict[str, Any], *overrides: str, **settings: Any) -> Any:
    settings = {"trials": 3, **settings}
    return define(SweepSettings(space=space, overrides=PLAIN, **settings), list(overrides), load_config)


def test_the_command_lines_overrides_replace_the_presets() -> None:
    assert merged(["model=tiny", "optim.lr=1"], ["optim.lr=2", "model=small"]) == ["optim.lr=2", "model=small"]
    defined = _define({"router.top_k": "2,3"}, "optim.lr=0.5", "train.seed=7")
    assert defined.overrides({"router.top_k": 2}, 9) == [
        "engine=plain", "tracking=none", "optim.lr=0.5", "router.top_k=2", "train.seed=9",
    ]  # fmt: skip
    assert defined.base.optim.lr == 0.5


@pytest.mark.parametrize(
    ("space", "overrides", "said"),
    [
        ({"router.aux_los_coef": "1,2"}, [], "did you mean router.aux_loss_coef"),
        ({"router.top_k": "2,9"}, [], "sweep.space.router.top_k: router.top_k=9 must be ≤ router.num_experts=8"),
        ({"router.top_k": "2,3"}, ["router.top_k=2"], "router.top_k=2: router.top_k is searched"),
        ({"router": "topk,topq"}, [], "router=topq must be one of "),
        ({"train.seed": "1,2"}, [], "sweep.seeds=N"),
        ({"optim.lr": "interval(-1, 1)"}, [], "sweep.space.optim.lr: optim.lr=-1.0 must be > 0"),
        ({"train.epochs": "1,2"}, [], "sweep.space.train.epochs: train.epochs=1.0: a sweep plans its trials in steps"),
        ({"router.top_k": "1,2"}, ["train.epochs=3"], "train.epochs=3.0: a sweep plans its trials in steps"),
    ],
)
def test_a_space_that_can_not_be_trained_is_refused(space: dict[str, str], overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        _define(space, *overrides)
    assert said in str(refused.value)


def test_a_grid_needs_values_and_lists_its_points() -> None:
    with pytest.raises(ValueError, match=r"sweep\.sampler=grid needs choice\(…\) or range\(…\), not an interval"):
        _define({"optim.lr": "interval(0.1, 1)"}, sampler=Sampler.grid)
    grid = _define({"router.top_k": "2,3", "optim.lr": "0.1,0.2"}, sampler=Sampler.grid)
    assert grid.listed() == [
        {"router.top_k": k, "optim.lr": lr} for k in (2, 3) for lr in (0.1, 0.2)
    ]  # the last key changes fastest


def test_given_points_are_named_lists_of_overrides() -> None:
    settings = SweepSettings(sampler=Sampler.points, points={"a": ["router.top_k=3"], "b": []}, overrides=PLAIN)
    defined = define(settings, [], load_config)
    assert defined.names() == ["point", "router.top_k"]
    assert defined.params({"point": "a"}) == {"point": "a", "router.top_k": "3"}
    assert defined.overrides({"point": "a"}, 0)[-2:] == ["router.top_k=3", "train.seed=0"]
    broken = SweepSettings(sampler=Sampler.points, points={"c": ["router.top_q=1"]}, overrides=PLAIN)
    with pytest.raises(ValueError, match=r"sweep\.points\.c: router\.top_q=1: no such key"):
        define(broken, [], load_config)


def test_whether_some_trial_has_routers() -> None:
    assert _define({"model.mlp": "dense,sparse"}).has_routers
    assert not _define({"optim.lr": "0.1,0.2"}, "model.mlp=dense").has_routers
    points = {"a": ["model.mlp=dense"], "b": []}
    assert define(SweepSettings(sampler=Sampler.points, points=points, overrides=PLAIN), [], load_config).has_routers


def test_the_same_training_has_the_same_digest_wherever_it_is_written() -> None:
    one, other = (load_config([*PLAIN, f"run_dir={name}", f"data.cache_dir={name}"]) for name in "ab")
    assert config_digest(one) == config_digest(other)
    assert config_digest(one) != config_digest(load_config([*PLAIN, "train.seed=1"]))


def test_differences_name_key_and_both_values() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b: 2 → 3", "c: (nothing) → 4"]
