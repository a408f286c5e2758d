"""A run's config.yaml as it was saved: plain values. Somebody else may have written it: nothing in it is resolved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe.errors import UserError
from moe.untrusted import read_text

LARGEST = 1 << 18  # bytes; a shipped configuration has 3,000
DEEPEST = 16  # mappings and lists inside each other
INTERPOLATION = "${"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_saved(path: Path) -> tuple[str, dict[Any, Any]]:
    """(text, keys and values) of a saved configuration. Raises UserError, which names the file, for what isn't a
    mapping of plain values: an interpolation (`${oc.env:NAME}` would show a variable of the reader's), an alias (a few
    lines of them make more text than there is memory), values nested too deep; OSError."""
    text = read_text(path, LARGEST)
    try:
        _check_plain(text)
        loaded = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else {}
    except UserError as error:
        raise UserError(f"{path}:{error}") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not readable as YAML ({reason})") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: not a mapping of keys")
    return text, loaded


def _check_plain(text: str) -> None:
    """Raises UserError that begins with the line's number, YAMLError."""
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{line}: *{event.anchor} is an alias: a saved configuration has none; write the value out")
        if isinstance(event, yaml.ScalarEvent) and INTERPOLATION in event.value:
            raise UserError(
                f"{line}: {event.value[:60]} is an interpolation: a saved configuration has none; write the value out"
            )
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                raise UserError(f"{line}: values nested more than {DEEPEST} deep are no configuration")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
