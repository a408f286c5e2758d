"""`moe ls` and `moe cp`: list the presets, and copy one to edit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from moe.config.presets import config_dir, groups, presets
from moe.config.suggest import closest
from moe.errors import ConfigError


def list_presets(group: str | None = None) -> str:
    """The groups and their presets, one line per group; of `group` one line per preset: name, origin, first comment."""
    if group is None:
        width = max(map(len, groups()))
        lines = [f"  {name:{width}}  {' '.join(presets(name)) or '(none shipped)'}" for name in groups()]
        return "\n".join(
            ["Groups and their presets, as in `moe train model=small` (`moe ls model` says what each is):", *lines]
        )
    _check_group(group)
    width = max(map(len, presets(group)), default=0)
    return "\n".join(f"{name:{width}}  {_origin(path)}{_comment(path)}" for name, path in presets(group).items())


def copy_preset(source: str, target: str) -> str:
    """Copies GROUP/NAME to a new file or into a folder; returns a line on its use. Raises ConfigError, OSError."""
    group, _, name = source.removesuffix(".yaml").partition("/")
    _check_group(group)
    if name not in presets(group):
        near = closest(name, list(presets(group)))
        meant = f"; did you mean {group}/{near}?" if near else ""
        raise ConfigError(f"{source}: {group} has {', '.join(presets(group))}{meant}")
    path = Path(target)
    if path.is_dir():
        path /= f"{name}.yaml"
    if path.suffix != ".yaml":
        raise ConfigError(f"{target}: must be a folder or end with .yaml")
    if path.exists():
        raise ConfigError(f"{path} exists: choose another name, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(presets(group)[name], path)
    return f"{path}: edit it, then `moe train {group}={path}`"


def _check_group(group: str) -> None:
    if group not in groups():
        near = closest(group, groups())
        meant = f"; did you mean {near}?" if near else ""
        raise ConfigError(f"{group}: must be one of {', '.join(groups())}{meant}")


def _origin(path: Path) -> str:
    return "" if path.is_relative_to(config_dir()) else f"({path}) "


def _comment(path: Path) -> str:
    """The first sentence of the comment at the file's head, without Hydra's package directive."""
    text = ""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith("#"):
            break
        text += "" if "@package" in line else line.lstrip("#")
    return re.split(r"(?<=[.:]) ", text.strip(), maxsplit=1)[0].rstrip(":.")
