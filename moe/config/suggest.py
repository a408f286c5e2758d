"""The message for a key that doesn't exist: the current name of a renamed key, or the closest existing key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from moe.config.migrate import renamed
from moe.config.router import kinds_with, router_kinds


def no_such_key(key: str, overrides: list[str], known: list[str]) -> str:
    """A one-line message for an unknown dotted `key`, which one of `overrides` sets, or else a file."""
    plain = [override.lstrip("+~") for override in overrides]
    given = next((override for override in plain if override.startswith((f"{key}=", f"{key}."))), key)
    if now := renamed(key):
        return f"{'' if given == key else f'{given}: '}{key} is now {now}"
    near = nearest_keys(key, known)
    if not near:
        return f"{given}: no such key; `moe VERB --help` lists them all"
    return f"{given}: no such key; did you mean {' or '.join(name + given.removeprefix(key) for name in near)}?"


def of_other_routers(kind: object, overrides: Iterable[str]) -> str | None:
    """The message for an option that routers of this kind don't have and others do; None if no override sets one."""
    for override in overrides:
        given = override.lstrip("+")
        option = re.match(r"router\.(\w+)[.=]", given)
        having = kinds_with(option[1]) if option else []
        if option and having and kind not in having and kind in router_kinds():
            return f"{given}: {kind} routers have no {option[1]}; {', '.join(having)} routers do"
    return None


def nearest_keys(key: str, known: list[str]) -> list[str]:
    """The keys of `known` that were probably meant: those with the same last part, or else a similar spelling."""
    known = [name for name in known if not f"{key}.".startswith(f"{name}.") and not name.startswith(f"{key}.")]
    last = {name: name.rpartition(".")[2] for name in known}
    part = key.rpartition(".")[2]
    if same := [name for name in known if last[name] == part]:
        return same
    if near := closest(key, known):
        return [near]
    alike = closest(part, list(last.values()))
    return [name for name in known if last[name] == alike]


def closest(name: str, known: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.8)), None)


def dotted_keys(tree: Mapping[Any, Any], prefix: str = "") -> list[str]:
    """Every key of nested mappings, sections included."""
    found: list[str] = []
    for name, value in tree.items():
        found.append(f"{prefix}{name}")
        if isinstance(value, Mapping):
            found += dotted_keys(value, f"{prefix}{name}.")
    return found
