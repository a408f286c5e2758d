"""Turns Hydra's and OmegaConf's multi-line messages into one line: key, value, rule, fix."""

from __future__ import annotations

import re
from collections.abc import Callable

from moe.config.presets import choices, groups
from moe.config.router import router_kinds
from moe.config.suggest import closest, no_such_key

_HINTS = {
    "hardware": "; or describe yours: hardware=custom hardware.gpus_per_node=4 hardware.memory_gb=48 … "
    "(`moe plan hardware=custom` names what is missing)",
}
_RULES = [  # OmegaConf's text → the rule
    (r"could not be converted to Integer", "must be a whole number"),
    (r"could not be converted to Float", "must be a number"),
    (r"is not a valid bool", "must be true or false"),
    (r"is not Optional|Incompatible value 'None'", "must have a value, not null"),
    (r"expected one of \[(.*)\]", r"must be one of \1"),
    (r"Cannot convert '(\w+)' to string", r"must be text, not a \1; to have this text, put it in quotes: KEY='\"…\"'"),
    (r"Environment variable '(\w+)' not found", r"the environment variable \1 is not set"),
    (r"(\w+) is not a ListConfig", r"must be a list, as in KEY=[…], not one \1"),
    (r"Cannot assign (\w+) to Dict", r"must be a mapping, as in KEY={…}, not one \1"),
    (r"Invalid type assigned: (\w+) is not a subclass", r"must be a section with keys, not one \1"),
]


def explain(error: BaseException, overrides: list[str], known: Callable[[], list[str]]) -> str:
    """A one-line message for an error raised while composing `overrides`; `known` returns the keys that exist."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if text.startswith("Error merging override") and error.__cause__ is not None:
        override = _typed(text.removeprefix("Error merging override "), overrides)
        section, _, value = override.partition("=")
        if str(error.__cause__).startswith("Invalid type assigned: str"):  # no such group
            keys = ", ".join(key for key in known() if key.startswith(f"{section}."))
            return f"{override}: there is no preset {value}; {section} is set by its keys, {keys}"
        reason = explain(error.__cause__, [], known).removeprefix(section).lstrip(": ")
        return f"{override}{' ' if reason.startswith('must ') else ': '}{reason}"
    in_preset = re.match(r"In '(?P<group>\w+)/(?P<name>[^']*)': (\w+) raised while composing", text)
    if in_preset:
        group = in_preset["group"]
        given = next(
            (one for one in overrides if one.lstrip("+").startswith(f"{group}=")), f"{group}={in_preset['name']}"
        )
        return f"{given}: {explain(type(error)(str(error).partition(chr(10))[2]), [], known)}"
    missing = re.match(r"In '.*': Could not (find|load) '(?P<group>\w+)/(?P<name>[^']*)'", text)
    if missing:
        return no_such_preset(missing["group"], missing["name"])
    if text.startswith(("LexerNoViableAlt", "mismatched input", "no viable alternative", "token recognition")):
        return next(
            no_such_key(override.lstrip("+~").partition("=")[0], overrides, known())
            for override in overrides
            if not re.match(r"[+~]*[\w/@]+(\.\w+)*(=|$)", override)
        )
    twice = re.match(r"(Multiple values for )?(?P<group>[\w/]+)(\. To override| appears more than once)", text)
    if twice:
        return f"{_typed(twice['group'], overrides)}: {twice['group']} is chosen already: choose it once, without `+`"
    if text.startswith("Config group override must be a string"):
        override = next(override for override in reversed(overrides) if override.partition("=")[0] in groups())
        group, _, value = override.lstrip("+").partition("=")
        return no_such_preset(group, value)
    full = re.search(r"full_key: (\S+)", f"{error}\n{error.__cause__}")
    key = full[1] if full else ""
    unknown = re.match(r"(Could not override|Key) '(?P<key>[^']+)'", text)
    if unknown:
        return no_such_key(key or unknown["key"], overrides, known())
    for pattern, rule in _RULES:
        if match := re.search(pattern, text):
            text = match.expand(rule)
            break
    given = _typed(key, overrides)
    return f"{given}{' ' if text.startswith('must ') else ': '}{text}" if given else text


def _typed(key: str, overrides: list[str]) -> str:
    """The override of this key as the user typed it, or the key if there is none."""
    key = key.lstrip("+~").partition("=")[0]
    return next((given for given in overrides if given.lstrip("+~").partition("=")[0] == key), key)


def no_such_preset(group: str, name: str) -> str:
    if group == "router" and name.endswith("_schema"):  # named in a YAML's defaults list
        kind = name.removesuffix("_schema")
        return f"router.kind={kind} must be one of {', '.join(router_kinds())}: import the module that registers it"
    near = closest(name, choices(group))
    meant = f"; did you mean {group}={near}?" if near else ""
    return f"{group}={name} must be one of {', '.join(choices(group))}{meant}{_HINTS.get(group, '')}"
