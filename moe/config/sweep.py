"""`moe sweep`: what is searched, by which sampler, and when the search ends."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from moe.config.choices import Pruner, Sampler
from moe.config.rules import MISSING, filled, is_seed, positive, require

MAX_TOKENS = 10**15


@dataclass(kw_only=True, slots=True)
class SweepSettings:
    """What is searched, by which sampler, and when the search ends.

    `space` gives each searched key of `moe train` its values in Hydra's override language: choice(…), range(…),
    interval(…), tag(log, interval(…)), int(interval(…)) or `a,b`. `points` (with sampler=points) names lists of
    overrides instead. `overrides` apply to every trial, as do those on the command line. A trial is one point with one
    seed; each point is trained with `seeds` seeds, counted up from train.seed.
    `objectives` are names of metrics.jsonl, minimised unless they are in `maximize`: of a val_ metric the last value,
    of any other the mean over the last `average_steps` steps. Several give a Pareto front, and no pruning.
    The sweep ends after `trials` trials, `tokens` trained tokens or `hours` of this command (grid and points: also when
    all are trained). `storage` null is a journal file in run_dir; sqlite:///FILE and postgresql://… are Optuna's.
    `workers` trials run at a time on this machine; `join=true` is one of several commands, perhaps on several machines,
    that work on the same study.
    """

    space: dict[str, Any] = field(default_factory=dict)
    points: dict[str, list[str]] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    sampler: Sampler = Sampler.tpe
    sampler_seed: int = 0
    objectives: list[str] = field(default_factory=lambda: ["val_loss", "max_violation"])
    maximize: list[str] = field(default_factory=list)
    average_steps: int = 20
    seeds: int = 1
    pruner: Pruner = Pruner.none
    trials: int | None = None
    tokens: int | None = None
    hours: float | None = None
    workers: int = 1
    join: bool = False
    storage: str | None = None

    def __post_init__(self) -> None:
        positive("sweep", self, "average_steps", "seeds", "trials", "hours", "workers")
        positive("sweep", self, "tokens", at_most=MAX_TOKENS)
        is_seed("sweep", self, "sampler_seed")
        filled("sweep", self, "storage")
        require(bool(self.objectives), "sweep.objectives=[] must name a metric, as in sweep.objectives=[val_loss]")
        twice = [name for name in self.objectives if self.objectives.count(name) > 1]
        require(not twice, f"sweep.objectives: {twice[:1]} is named twice")
        for name in self.maximize:
            require(
                name in self.objectives,
                f"sweep.maximize={self.maximize}: {name} must be one of sweep.objectives={self.objectives}",
            )
        require(
            self.pruner is Pruner.none or len(self.objectives) == 1,
            f"sweep.pruner={self.pruner.name} needs one objective, not {' and '.join(self.objectives)}: Optuna can't "
            "prune by several; sweep.objectives=[val_loss] or sweep.pruner=none",
        )
        given = self.sampler is Sampler.points
        require(given or not self.points, f"sweep.points needs sweep.sampler=points, not {self.sampler.name}")
        require(
            given or bool(self.space),
            "sweep.space={} is empty: name a key and its values, as in "
            "router.aux_loss_coef: tag(log, interval(1e-4, 1e-1))",
        )
        require(not given or bool(self.points), "sweep.points={} is empty: sampler=points needs NAME: [KEY=VALUE, …]")
        require(not given or not self.space, "sweep.space must be left out with sweep.sampler=points")
        require(
            any((given, self.sampler is Sampler.grid, self.trials, self.tokens, self.hours)),
            f"sweep.sampler={self.sampler.name} never ends by itself: set sweep.trials, sweep.tokens or sweep.hours",
        )
        require(
            self.sampler is not Sampler.nsga2 or len(self.objectives) > 1,
            "sweep.sampler=nsga2 is for several objectives; sweep.sampler=tpe for one",
        )


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """A study in `run_dir`: trials.csv, report.html, and trials/NUMBER, each the run directory of a `moe train`."""

    run_dir: str = "runs/sweep"
    sweep: SweepSettings = MISSING  # a group of presets, which has no default here

    def __post_init__(self) -> None:
        filled("", self, "run_dir")
        self.run_dir = os.path.expanduser(self.run_dir)
