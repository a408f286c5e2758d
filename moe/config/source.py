"""Composes a run's model, router and tokenizer from those of `init_from`, for what the command doesn't state."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe.config.data import path_name

SECTIONS = ("model", "router", "tokenizer")
Sections = Mapping[str, Mapping[str, Any]]
ReadSource = Callable[[str, str | None], Sections]  # (init_from, the stated run_dir) → SECTIONS; raises UserError


def stated(overrides: list[str], key: str) -> str | None:
    """The value of the last override `key=value`; None for null or without one."""
    found = [one.partition("=")[2] for one in overrides if one.lstrip("+").partition("=")[0] == key]
    value = found[-1].strip() if found else "null"
    return None if value == "null" else re.sub(r"^(['\"])(.*)\1$", r"\2", value)


def stated_keys(overrides: list[str]) -> set[str]:
    """Keys and groups that the overrides set."""
    return {one.lstrip("+").partition("=")[0] for one in overrides}


@contextmanager
def source_presets(init_from: str, sections: Sections, overrides: list[str]) -> Iterator[list[str]]:
    """Yields overrides that choose the sections as presets, for all whose group the command doesn't choose itself."""
    import tempfile

    import yaml

    chosen = stated_keys(overrides)
    name = re.sub(r"[^\w.+-]", "-", path_name(init_from)) or "source"
    with tempfile.TemporaryDirectory(prefix="moe-init-from-") as folder:
        more = []
        for section, keys in sections.items():
            if section in chosen:
                continue
            preset: dict[str, Any] = dict(keys)
            if section == "router":
                preset = {"defaults": [f"{keys.get('kind', 'topk')}_schema"], **preset}
            path = Path(folder, section, f"{name}.yaml")
            path.parent.mkdir()
            path.write_text(yaml.safe_dump(preset, sort_keys=False), encoding="utf-8")
            more.append(f"{section}={path}")
        yield more
