"""What a sweep searches: its dimensions, the overrides of a trial, and how it differs from another sweep's."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from moe.config import Config, Sampler
from moe.config.flat import flatten
from moe.config.presets import groups
from moe.config.rules import require
from moe.config.space import Dimension, Value, read_space
from moe.config.sweep import SweepSettings
from moe.errors import UserError
from moe.report.sweep_reader import POINT

# Where a trial is written and cached changes nothing in it.
ELSEWHERE = ("run_dir", "tracking.", "data.cache_dir", "check_memory", "profile", "train.peak_tflops")
MAX_GRID = 100_000
OPEN = ("sweep.space.", "sweep.points.")

Load = Callable[[list[str]], Config]  # overrides of `moe train` → a checked configuration; raises UserError


@dataclass(frozen=True, slots=True)
class Definition:
    """`fixed` are the overrides of every trial, `base` the configuration that they make; `has_routers`: some trial's
    model has a sparse layer."""

    settings: SweepSettings
    dimensions: list[Dimension]
    fixed: list[str]
    base: Config
    has_routers: bool

    def overrides(self, point: Mapping[str, Value], seed: int) -> list[str]:
        """What follows `moe train` to train this point, without run_dir."""
        if self.settings.sampler is Sampler.points:
            chosen = self.settings.points[str(point[POINT])]
        else:
            chosen = [one.override(point[one.key]) for one in self.dimensions]
        return merged(self.fixed, chosen, [f"train.seed={seed}"])

    def params(self, point: Mapping[str, Value]) -> dict[str, Any]:
        """{searched key: value} as trials.csv has them; of a named point its name and the keys that it sets."""
        if self.settings.sampler is not Sampler.points:
            return dict(point)
        named = (override.partition("=") for override in self.settings.points[str(point[POINT])])
        return {POINT: point[POINT], **{key.lstrip("+"): value for key, _, value in named}}

    def names(self) -> list[str]:
        """The searched keys, in the order of trials.csv's columns."""
        if self.settings.sampler is not Sampler.points:
            return [one.key for one in self.dimensions]
        keys = [_key(override) for overrides in self.settings.points.values() for override in overrides]
        return [POINT, *dict.fromkeys(keys)]

    def listed(self) -> list[dict[str, Value]] | None:
        """Every point, where the sweep has a list of them: a grid's or the given ones."""
        if self.settings.sampler is Sampler.points:
            return [{POINT: name} for name in self.settings.points]
        if self.settings.sampler is not Sampler.grid:
            return None
        axes = [one.finite() for one in self.dimensions]
        count = math.prod(map(len, axes))
        require(count <= MAX_GRID, f"sweep.space: a grid of {count:,} points must have at most {MAX_GRID:,}")
        return [
            dict(zip([one.key for one in self.dimensions], values, strict=True)) for values in itertools.product(*axes)
        ]

    def tokens(self) -> int:
        """Tokens that a trial trains on, by the fixed overrides."""
        train = self.base.train
        return train.steps * train.global_batch_size * train.sequence_length

    def as_dict(self) -> dict[str, Any]:
        """What a study can't change, as flat JSON; the rest (trials, hours, workers, …) may differ between commands."""
        settings = self.settings
        told: dict[str, Any] = {f"sweep.space.{one.key}": one.expression for one in self.dimensions}
        told |= {f"sweep.points.{name}": overrides for name, overrides in settings.points.items()}
        for name in ("sampler", "sampler_seed", "objectives", "maximize", "average_steps", "seeds", "pruner"):
            value = getattr(settings, name)
            told[f"sweep.{name}"] = value.name if isinstance(value, Enum) else value
        told |= {key: value for key, value in flatten(self.base).items() if not key.startswith(ELSEWHERE)}
        return json.loads(json.dumps(told, default=str))


def define(settings: SweepSettings, overrides: list[str], load: Load) -> Definition:
    """`overrides` are the command line's for every trial. Every value of the space is tried in a configuration, nothing
    is trained. Raises UserError."""
    dimensions = read_space(settings.space)
    fixed = merged(settings.overrides, overrides)
    for one in dimensions:
        for override in fixed:
            require(
                _key(override) != one.key,
                f"{override}: {one.key} is searched (sweep.space.{one.key}={one.expression}); leave it out or search "
                "another space",
            )
    searched_groups = [one for one in dimensions if one.key in groups()]
    for one in dimensions:
        require(one.key != "train.seed", "sweep.space.train.seed: seeds are not searched: sweep.seeds=N trains N each")
        require(one.key != "run_dir", "sweep.space.run_dir: each trial has its own under the sweep's run_dir")
    definition = Definition(settings, dimensions, fixed, _in_steps(load(fixed)), has_routers=False)
    if settings.sampler is Sampler.points:
        tried = [_tried(definition, {POINT: name}, load, f"sweep.points.{name}") for name in settings.points]
        return _with_routers(definition, tried)
    first: dict[str, Value] = {one.key: one.examples()[0] for one in dimensions}
    presets = [dict(zip([g.key for g in searched_groups], values, strict=True)) for values in _product(searched_groups)]
    tried = []
    for chosen in presets:
        for one in dimensions:
            values = one.examples() if one not in searched_groups else one.examples()[:1]
            for value in values:
                tried.append(_tried(definition, {**first, one.key: value, **chosen}, load, f"sweep.space.{one.key}"))
    definition.listed()
    return _with_routers(definition, tried)


def _product(dimensions: list[Dimension]) -> list[tuple[Value, ...]]:
    return list(itertools.product(*(one.examples() for one in dimensions)))


def _tried(definition: Definition, point: Mapping[str, Value], load: Load, where: str) -> Config:
    try:
        return _in_steps(load(definition.overrides(point, 0)))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _in_steps(config: Config) -> Config:
    require(
        config.train.epochs is None,
        f"train.epochs={config.train.epochs}: a sweep plans its trials in steps: give train.steps instead",
    )
    return config


def _with_routers(definition: Definition, tried: list[Config]) -> Definition:
    return replace(definition, has_routers=any(config.model.sparse_layer_numbers for config in tried))


def merged(*lists: list[str]) -> list[str]:
    """Overrides in order; a later one of the same key replaces the earlier."""
    found: dict[str, str] = {}
    for override in itertools.chain(*lists):
        found.pop(_key(override), None)
        found[_key(override)] = override
    return list(found.values())


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(overrides of the sweep itself, overrides of every trial)."""
    own = [one for one in arguments if _key(one) in ("sweep", "run_dir") or _key(one).startswith("sweep.")]
    rest = [one for one in arguments if one not in own]
    # Names of searched keys and of points are the user's: a new one is added to those of the preset.
    return [f"++{one.lstrip('+')}" if _key(one).startswith(OPEN) else one for one in own], rest


def config_digest(config: Config) -> str:
    """Equal for two trials that train the same: the configuration with its seed, without the places."""
    told = {key: value for key, value in flatten(config).items() if not key.startswith(ELSEWHERE)}
    return hashlib.sha256(json.dumps(told, default=str, sort_keys=True).encode()).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key: old → new` for each key that differs."""
    keys = list(dict.fromkeys((*before, *now)))
    nothing = "(nothing)"
    return [
        f"{key}: {before.get(key, nothing)} → {now.get(key, nothing)}"
        for key in keys
        if before.get(key, nothing) != now.get(key, nothing)
    ]
