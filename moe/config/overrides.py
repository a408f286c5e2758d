"""Quotes override values that Hydra's grammar would otherwise reject, trim or split."""

from __future__ import annotations

import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

TEXTS = ("prompt", "stop", "system")
TEXT_LISTS = ("tokenizer.add_special_tokens",)


def quote_texts(overrides: list[str]) -> list[str]:
    """Quotes the values of `prompt=`, `stop=` and `system=`, so that they are used exactly as typed.

    Unquoted, Hydra trims `prompt=def ` and splits `prompt=Once, twice`. Quoted values and `null` are left as they are.
    """
    return [
        f"{key}={_quoted(value, escape=True)}" if key in TEXTS and not _is_quoted(value) else override
        for override in overrides
        for key, _, value in [override.partition("=")]
    ]


# Mappings with keys of the user's own.
OPEN_MAPPINGS = ("router.schedules", "router.layers", "adapter.rank_pattern")


def for_hydra(overrides: list[str]) -> list[str]:
    """Quotes values that Hydra can't parse, as in `data.path=my file(1).txt`, or reads as several, as in `a,b`.

    Adds new keys to mappings whose keys are the user's own, as in `router.layers.3.top_k=1`.
    """
    parser = OverridesParser.create()
    listed = [_quoted_list(override) for override in overrides]
    quoted = [override if _parses(parser, override) else _with_quotes(override) for override in listed]
    return [f"++{one.lstrip('+')}" if re.match(rf"\+*({'|'.join(OPEN_MAPPINGS)})[.=]", one) else one for one in quoted]


def _quoted_list(override: str) -> str:
    """Quotes the elements of a list of texts that Hydra's grammar has no unquoted form for."""
    key, _, value = override.partition("=")
    if key.lstrip("+") not in TEXT_LISTS or not re.fullmatch(r"\[[^'\"]*\]", value):
        return override
    elements = [one.strip() for one in value[1:-1].split(",")] if value[1:-1].strip() else []
    return f"{key}=[{','.join(_quoted(one, escape=True) for one in elements)}]"


def _parses(parser: OverridesParser, override: str) -> bool:
    try:
        return not parser.parse_override(override).is_sweep_override()
    except HydraException:
        return False


def _with_quotes(override: str) -> str:
    key, _, value = override.partition("=")
    return f"{key}={_quoted(value, escape=False)}"


def _is_quoted(value: str) -> bool:
    return value == "null" or (len(value) > 1 and value[0] == value[-1] and value[0] in "'\"")


def _quoted(value: str, *, escape: bool) -> str:
    """With `escape`, `${...}` is kept as text instead of being read as an interpolation."""
    # A backslash needs escaping only before a quote (for Hydra) and before an interpolation (for OmegaConf).
    value = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", r"\'")
    if escape:
        value = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return f"'{value}'"
