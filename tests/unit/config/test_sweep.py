"""The rules of a sweep's settings."""

from __future__ import annotations

import pytest

from moe.config import Pruner, Sampler, SweepConfig, SweepSettings
from moe.config.compose import load_config
from moe.errors import UserError
from moe.sweep.definition import split


def test_the_shipped_preset_composes() -> None:
    own, rest = split(
        ["sweep=router_quick", "run_dir=here", "model=small", "sweep.trials=6", "sweep.space.optim.lr=1,2"]
    )
    assert rest == ["model=small"]
    config = load_config(own, "sweep", SweepConfig)
    assert (config.run_dir, config.sweep.trials) == ("here", 6)
    assert config.sweep.space["optim"] == {"lr": "1,2"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "sweep.space={} is empty"),
        ({"space": {"a": "1,2"}}, "never ends by itself: set sweep.trials, sweep.tokens or sweep.hours"),
        ({"space": {"a": "1,2"}, "trials": 0}, "sweep.trials=0 must be > 0"),
        ({"space": {"a": "1,2"}, "trials": 1, "pruner": Pruner.median}, "sweep.pruner=median needs one objective, not"),
        ({"space": {"a": "1,2"}, "trials": 1, "objectives": []}, "sweep.objectives=[] must name a metric"),
        ({"space": {"a": "1,2"}, "trials": 1, "maximize": ["x"]}, "x must be one of sweep.objectives"),
        ({"points": {"a": []}}, "sweep.points needs sweep.sampler=points, not tpe"),
        ({"sampler": Sampler.points}, "sweep.points={} is empty"),
        (
            {"space": {"a": "1,2"}, "trials": 1, "sampler": Sampler.nsga2, "objectives": ["val_loss"]},
            "sweep.sampler=nsga2 is for several objectives",
        ),
    ],
)
def test_a_broken_rule_names_the_key(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as refused:
        SweepSettings(**settings)  # type: ignore[arg-type]
    assert said in str(refused.value)


def test_a_grid_ends_by_itself() -> None:
    assert SweepSettings(space={"a": "1,2"}, sampler=Sampler.grid).trials is None
