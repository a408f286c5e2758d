"""Overrides of a key or preset that doesn't exist, or of the wrong type, found without Hydra.

Hydra finds them too, but later: importing it and composing take most of the time until `moe` answers. What can't be
decided from the dataclasses and the shipped presets alone is left to Hydra.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from moe.config.explain import no_such_preset
from moe.config.migrate import check_overrides
from moe.config.presets import choices, config_dir, groups, presets
from moe.config.router import registered_router, router_kinds
from moe.config.source import stated, stated_keys
from moe.config.suggest import dotted_keys, no_such_key
from moe.errors import ConfigError, UserError

_PLAIN = r"(?P<key>\w+(\.\w+)*)=(?P<value>.*)"


def check_form(overrides: list[str]) -> None:
    """Raises ConfigError for an override that isn't key=value, or that sets a key of earlier versions."""
    for override in overrides:
        if not re.match(r"~|[^=]+=", override):
            raise ConfigError(f"{override}: must be key=value, as in model=small or train.steps=100")
        if override.startswith("~") and not re.fullmatch(r"~data\.sources\.[^.=]+", override):
            raise ConfigError(
                f"{override}: only a source can be removed (~data.sources.NAME); set any other key to another value: "
                "GROUP=NAME or KEY=VALUE"
            )
    try:
        check_overrides(overrides)
    except UserError as error:
        raise ConfigError(str(error)) from error
    hydras = [override for override in overrides if override.lstrip("+~").startswith(("hydra.", "hydra/", "hydra="))]
    if hydras:
        raise ConfigError(f"{hydras[0]}: Hydra's own settings are not read here; `moe VERB --help` lists the keys")


def check_names(overrides: list[str], name: str, schema: type) -> None:
    """Raises ConfigError, as composing configs/`name`.yaml would, for an override of a preset or key that isn't there,
    and for a word where there must be a number, true or false, or a choice.

    Overrides that aren't plain KEY=VALUE pass, and so do those that an experiment or `init_from` decides about.
    """
    plain = [found for override in overrides if (found := re.fullmatch(_PLAIN, override, re.DOTALL))]
    tree = _tree(schema, router_kinds())
    composed = {*tree} | ({"experiment"} if "model" in tree else set())
    known_groups = groups()
    for found in plain:
        group, preset = found["key"], found["value"]
        if group in known_groups and group in composed and _is_preset(preset) and preset not in choices(group):
            raise ConfigError(no_such_preset(group, preset))
    for found in plain:
        key, hint = (None, None) if found["key"] in known_groups else _look_up(tree, found["key"].split("."))
        if key is None:
            if rule := _broken_rule(hint, found["value"]):
                raise ConfigError(f"{found[0]} {rule}")
            continue
        if (chosen := _chosen_tree(overrides, name, schema)) is not None:
            raise ConfigError(no_such_key(key, overrides, dotted_keys(chosen)))
        return


def _is_preset(value: str) -> bool:
    """Whether the value can be a preset's name: neither a file, nor null, nor a schema."""
    return bool(re.fullmatch(r"[\w.+-]+", value)) and not re.search(r"(^null|\.ya?ml|_schema)$", value.lower())


def _look_up(tree: Mapping[str, Any], parts: list[str]) -> tuple[str | None, Any]:
    """(the dotted key up to its first part that doesn't exist, None); for a key that exists (None, its value's type, or
    None where that isn't known)."""
    node: Any = tree
    for number, part in enumerate(parts, 1):
        if not isinstance(node, Mapping) or not node:  # below a value, or in a mapping whose keys are the user's own
            return None, None
        if part not in node:
            return ".".join(parts[:number]), None
        node = node[part]
    return None, node


def _broken_rule(hint: Any, value: str) -> str | None:
    """The rule that a value of one word breaks if it isn't of this type; None if it breaks none."""
    kinds = get_args(hint) or (hint,)
    if not re.fullmatch(r"[A-Za-z]\w*", value) or value.lower() == "null" or not isinstance(kinds[0], type):
        return None
    kind = kinds[0]
    if issubclass(kind, Enum):
        names = list(kind.__members__)
        return None if value in names else f"must be one of {', '.join(names)}"
    if kind is bool and value.lower() not in ("true", "false", "yes", "no", "on", "off", "y", "n"):
        return "must be true or false"
    if kind is float and value.lower() not in ("inf", "nan"):
        return "must be a number"
    return "must be a whole number" if kind is int else None


def _tree(schema: type, kinds: list[str]) -> dict[str, Any]:
    """A dataclass as nested mappings: a section is a mapping, a mapping whose keys are the user's own an empty one, a
    value its type. The section `router` has the options of these kinds."""
    tree: dict[str, Any] = {}
    for name, hint in get_type_hints(schema).items():
        if name == "router":
            tree[name] = {
                key: value for kind in kinds for key, value in _tree(registered_router(kind).schema, []).items()
            }
        elif isinstance(hint, type) and is_dataclass(hint):
            tree[name] = _tree(hint, kinds)
        else:
            tree[name] = {} if get_origin(hint) is dict else hint
    return tree


def _chosen_tree(overrides: list[str], name: str, schema: type) -> dict[str, Any] | None:
    """The keys of configs/`name`.yaml composed with the router that the overrides choose, as `_tree` has them. None
    when that can't be told without composing."""
    if stated_keys(overrides) & {"experiment", "init_from"}:
        return None
    chosen: dict[str, str] = {}
    for entry in _read(config_dir() / f"{name}.yaml")[1].get("defaults", []):
        chosen |= entry if isinstance(entry, dict) else {}
    if router := stated(overrides, "router"):
        chosen["router"] = router
    kind = ""
    presets_read: list[dict[str, Any]] = []
    for group, preset in chosen.items():
        path = None if preset is None else presets(group).get(preset)
        if preset is not None and path is None:
            return None
        is_global, preset_keys = _read(path) if path else (True, {})
        bases = preset_keys.pop("defaults", [])
        schemas = [re.fullmatch(r"(\w+)_schema", base) for base in bases if isinstance(base, str)]
        if group == "router" and len(bases) == len(schemas) == 1 and schemas[0] and schemas[0][1] in router_kinds():
            kind = schemas[0][1]
        elif bases:
            return None
        presets_read.append(preset_keys if is_global else {group: preset_keys})
    if "router" in chosen and not kind:
        return None
    tree = _tree(schema, [kind] if kind else [])
    for preset_keys in presets_read:
        _add(tree, preset_keys)
    return tree


def _read(path: Path) -> tuple[bool, dict[str, Any]]:
    """(whether the file's keys are the configuration's own rather than its group's, the keys)."""
    import yaml

    text = path.read_text(encoding="utf-8")
    return text.startswith("# @package _global_"), yaml.safe_load(text) or {}


def _add(tree: dict[str, Any], keys: Mapping[str, Any]) -> None:
    for key, value in keys.items():
        if isinstance(value, Mapping):
            _add(tree.setdefault(key, {}), value)
        else:
            tree.setdefault(key, None)
