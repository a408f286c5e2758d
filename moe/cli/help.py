"""`moe VERB --help`: what the verb does, its configuration groups and its keys."""

from __future__ import annotations

from typing import Any

from moe.cli.verbs import SCHEMAS, VERBS, schema
from moe.config.compose import compose_dict
from moe.config.presets import choices, groups


def help_text(verb: str) -> str:
    from omegaconf import OmegaConf

    text = [f"moe {verb}: {VERBS[verb].__doc__}"]
    if verb not in SCHEMAS:
        return "\n".join(text)
    text.append(
        f"\nUsage: moe {verb} [GROUP=NAME|FILE.yaml …] [KEY=VALUE …] [--config-dir DIR] [--cfg job]\n"
        "--config-dir adds your folder of presets, laid out as configs/ is (./configs is one without being named); "
        "--cfg job prints the composed config."
    )
    composed: Any = OmegaConf.to_container(compose_dict([], verb, schema(verb)), resolve=False, enum_to_str=True)
    named = [group for group in groups() if group in (*composed, *["experiment"] * ("model" in composed))]
    if named:
        text.append("\nGroups:")
        text += [f"  {group}={'|'.join(choices(group)) or '(yours)'}" for group in named]
    text.append("\nKeys and their values in this command:")
    text.append(_indented(composed))
    return "\n".join(text)


def _indented(node: Any, prefix: str = "") -> str:
    lines = []
    for key, value in node.items():
        if isinstance(value, dict) and value:
            lines.append(_indented(value, f"{prefix}{key}."))
        else:
            lines.append(f"  {prefix}{key}={'null' if value is None else value}")
    return "\n".join(lines)
