"""Keys of earlier versions: renamed in a run's config.yaml, rejected on the command line.

A run directory may be older than the code. Its config.yaml has `config_version`, and `migrate` applies the renamings of
every later version. To rename a key, increment `CONFIG_VERSION` and add the old name to `RENAMED`. A new key needs no
entry if its default is the previous behaviour; else the value that stands for it goes into `PREVIOUS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from moe.config.rules import require
from moe.errors import UserError

CONFIG_VERSION = 3  # configurations without config_version are version 0

# {version that renamed the key: {old key: new key}}
RENAMED: dict[int, dict[str, str]] = {
    1: {"parallel.expert": "parallel.expert_parallel_size"},
    2: {"checkpoint.init_from": "init_from"},
}
# {version that changed the default: {key: what a saved section without the key meant before}}
PREVIOUS: dict[int, dict[str, Any]] = {3: {"model.initializer": "normal"}}

# Removed groups and presets: pattern of the override → equivalent overrides ("": it is the default now).
_REPLACED: list[tuple[str, Callable[[re.Match[str]], str]]] = [
    (r"experts=(\w+)", lambda found: f"experts.backend={found[1]}"),
    (r"parallel=default", lambda found: ""),
    (r"hardware=h200_1x1", lambda found: "hardware=h200 hardware.gpus_per_node=1 hardware.host_memory_gb=256"),
    (r"hardware=([ah]\d00)_8x(\d+)", lambda found: f"hardware={found[1]}{_nodes(int(found[2]))}"),
    (r"hardware=cpu_1x1", lambda found: "hardware=cpu"),
    (r"hardware=cpu_2x1", lambda found: "hardware=cpu hardware.gpus_per_node=2"),
]


def _nodes(count: int) -> str:
    return "" if count == 1 else f" hardware.nodes={count}"


def migrate(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config.yaml with every key under its current name. Raises UserError if a newer version wrote it."""
    version = config.get("config_version", 0)
    require(type(version) is int and version >= 0, f"config_version={version} must be a whole number ≥ 0")
    require(
        version <= CONFIG_VERSION,
        f"config_version={version} is newer than this code's, which is {CONFIG_VERSION}: a newer moe wrote it; install "
        "that one or a later one",
    )
    for since, keys in RENAMED.items():
        if version < since:
            for old, new in keys.items():
                config = _renamed(config, old, new)
    for since, values in PREVIOUS.items():
        if version < since:
            for key, value in values.items():
                section, name = key.split(".")
                there = config.get(section)
                if isinstance(there, dict) and name not in there:  # a section that is none is an error of its reader
                    config = {**config, section: {**there, name: value}}
    return {**config, "config_version": CONFIG_VERSION}


def _renamed(config: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """A copy with the value of the dotted key `old` moved to `new`."""
    value, config = _without(config, old.split("."))
    return config if value is _ABSENT else _with(config, new.split("."), value, old)


_ABSENT = object()


def _without(config: dict[str, Any], path: list[str]) -> tuple[Any, dict[str, Any]]:
    name, *rest = path
    if name not in config or (rest and not isinstance(config[name], dict)):
        return _ABSENT, config
    if not rest:
        return config[name], {key: value for key, value in config.items() if key != name}
    value, inner = _without(config[name], rest)
    return value, {**config, name: inner}


def _with(config: dict[str, Any], path: list[str], value: Any, old: str) -> dict[str, Any]:
    name, *rest = path
    if rest:
        return {**config, name: _with(config.get(name) or {}, rest, value, old)}
    if name in config:
        raise UserError(f"{old} is now called {name}, and both are set: remove {old}")
    return {**config, name: value}


def renamed(key: str) -> str | None:
    """The current name of a renamed key, or of a key in a renamed section; None for any other key."""
    name = key
    for keys in RENAMED.values():
        for old, new in keys.items():
            if name == old or name.startswith(f"{old}."):
                name = new + name.removeprefix(old)
    return None if name == key else name


def check_overrides(overrides: list[str]) -> None:
    """Raises UserError for an override with a renamed or removed key, preset or group; the text says what to write."""
    for override in overrides:
        plain = override.lstrip("+~")
        key = plain.partition("=")[0]
        now = renamed(key)
        require(now is None, f"{plain}: {key} is now {now}")
        for pattern, replacement in _REPLACED:
            if found := re.fullmatch(pattern, plain):
                instead = replacement(found)
                raise UserError(f"{plain}: write {instead}" if instead else f"{plain}: leave it out, it is the default")
