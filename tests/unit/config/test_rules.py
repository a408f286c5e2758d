"""Sets every numeric key to extreme values: each gives a configuration that works, or a one-line error that names the
key. Keys are found in the schemas, so new ones are tested too."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from moe.config import AnalyzeConfig, Config, PlanConfig
from moe.config.compose import compose_dict, load_config, to_config
from moe.config.generate import GenerateConfig
from moe.errors import UserError
from moe.plan import make_plan
from moe.plan.show import verdict
from moe.train.optim import learning_rate

GIVEN = ["checkpoint=x", "prompt=a"]
VERBS: dict[str, tuple[str, type, list[str]]] = {
    "train": ("train", Config, []),  # and prepare
    "plan": ("plan", PlanConfig, []),
    "generate": ("generate", GenerateConfig, GIVEN),
    "analyze": ("analyze", AnalyzeConfig, GIVEN[:1]),
}
WHOLE = [0, -1, 1, 10**9, 10**9 + 1, 2**31, 2**63, 2**64, 10**15, 10**30]
REAL = [0.0, -1.0, 1e-320, 1e-37, 1e37, 1e300, 1e308, -1e308, float("nan"), float("inf"), float("-inf")]


def numeric_keys(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, type]]:
    """(dotted key, int or float) of every number in a composed configuration, and of lists the first."""
    for name in node:
        child: Any = node._get_node(name)
        if isinstance(child, DictConfig):
            yield from numeric_keys(child, f"{prefix}{name}.")
        elif OmegaConf.is_list(child):
            if child:
                yield f"{prefix}{name}.0", float
        elif child._metadata.ref_type in (int, float):
            yield f"{prefix}{name}", child._metadata.ref_type


def composed(verb: str) -> DictConfig:
    return copy.deepcopy(_composed_once(verb))


@cache
def _composed_once(verb: str) -> DictConfig:
    name, schema, given = VERBS[verb]
    return compose_dict(given, name, schema)


KEYS = [(verb, key, kind) for verb in VERBS for key, kind in numeric_keys(composed(verb))]


def use(config: Any) -> None:
    """Runs what a verb computes from its numbers before it reads files or starts anything."""
    if isinstance(config, PlanConfig):
        plan = make_plan(config)
        verdict(plan)
        json.dumps(plan.as_dict(), allow_nan=False)
    elif isinstance(config, Config):
        config.check_world(1)
        for step in (0, config.train.steps // 2, config.train.steps - 1):
            assert 0 <= learning_rate(config, step) <= config.peak_rate


def outcome(key: str, value: object, make: Any) -> str:
    """'' if the value works, else the one-line error, which must name the key."""
    try:
        use(make())
    except UserError as error:
        line = str(error)
        assert "\n" not in line, line
        assert key.removesuffix(".0") in line, f"{key}={value}: {line}"
        return line
    return ""


@pytest.mark.parametrize(("verb", "key", "kind"), KEYS, ids=[f"{verb}-{key}" for verb, key, _ in KEYS])
def test_a_number_works_or_is_one_line_that_names_the_key(verb: str, key: str, kind: type) -> None:
    node = composed(verb)

    def make(value: Any) -> Any:
        changed = copy.deepcopy(node)
        OmegaConf.update(changed, key, value)
        return to_config(changed, [f"{key}={value}"])

    refused = {
        value: outcome(key, value, lambda value=value: make(value))
        for value in (*WHOLE, *(REAL if kind is float else ()))
    }
    if kind is int:
        assert refused[10**30], "no whole number is needed that is so large"
    else:
        assert refused[float("inf")]


TYPED = [(verb, key) for verb, key, _ in KEYS if verb != "train" and not key.endswith(".0")]  # plan has train's keys


@pytest.mark.parametrize(("verb", "key"), TYPED)
def test_the_command_line_says_the_same(verb: str, key: str) -> None:
    name, schema, given = VERBS[verb]
    for value in ("nan", "1e308"):
        assert outcome(key, value, lambda value=value: load_config([*given, f"{key}={value}"], name, schema))
