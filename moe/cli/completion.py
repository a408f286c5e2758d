"""`moe completion bash`: completes verbs, groups with their presets, and keys. Static, so that a TAB starts no Python.

eval "$(moe completion bash)"                                  # in ~/.bashrc
autoload -U bashcompinit && bashcompinit && eval "$(moe completion bash)"     # in ~/.zshrc
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from moe.bench import BENCHMARKS
from moe.cli.verbs import SCHEMAS, VERBS, schema
from moe.config.compose import compose_dict
from moe.config.presets import groups, presets

_SCRIPT = """_moe() {{
    local line="${{COMP_LINE:0:COMP_POINT}}" verb candidates
    local word="${{line##*[[:space:]]}}"
    read -r _ verb _ <<< "$line"
    [[ "$line" =~ ^[[:space:]]*[^[:space:]]+[[:space:]]+[^[:space:]]*$ ]] && verb=""
    case "$verb" in
{cases}
    *) candidates="" ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$candidates" -- "$word")
    [[ ${{#COMPREPLY[@]}} -eq 1 && "${{COMPREPLY[0]}}" != *= ]] && compopt +o nospace
    # readline replaces only what follows the last "="
    [[ "$word" == *=* ]] && COMPREPLY=("${{COMPREPLY[@]#"${{word%=*}}="}}")
    return 0
}}
complete -o nospace -o default -F _moe moe
"""


def completion_script() -> str:
    """A script for bash, and for zsh with bashcompinit."""
    words = {"": list(VERBS), "ls": groups(), "bench": list(BENCHMARKS), "completion": ["bash"]}
    words["cp"] = [f"{group}/{name}" for group in groups() for name in presets(group)]
    words |= {verb: _overrides(verb, schema(verb)) for verb in SCHEMAS}
    cases = [f'    "{verb}") candidates="{" ".join(candidates)}" ;;' for verb, candidates in words.items()]
    return _SCRIPT.format(cases="\n".join(cases))


def _overrides(name: str, kind: type) -> list[str]:
    composed = compose_dict([], name, kind)
    chosen = [
        f"{group}={preset}"
        for group in groups()
        if group in (*composed, *["experiment"] * ("model" in composed))
        for preset in presets(group)
    ]
    return ["--help", "--config-dir", "--cfg", *chosen, *_keys(composed)]


def _keys(node: Any, prefix: str = "") -> list[str]:
    """`key=`, and `key=value` for the values of a choice."""
    from omegaconf import DictConfig, OmegaConf

    found = []
    for key in node:
        value = None if OmegaConf.is_missing(node, key) else node._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none():
            found += _keys(value, f"{prefix}{key}.")
            continue
        plain = None if value is None else value._value()
        values = ["true", "false"] if isinstance(plain, bool) else []
        values = [member.name for member in type(plain)] if isinstance(plain, Enum) else values
        found += [f"{prefix}{key}={name}" for name in values] or [f"{prefix}{key}="]
    return found
