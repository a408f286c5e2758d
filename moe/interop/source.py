"""What a run that starts from other weights takes from there: model, router and tokenizer; and those weights, where a
Hugging Face folder has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from moe.checkpoint.layout import CHECKPOINTS, CONFIG, committed
from moe.checkpoint.reader import candidates, tokenizer_folder
from moe.config.migrate import migrate
from moe.config.saved import read_saved
from moe.config.source import SECTIONS
from moe.errors import UserError
from moe.interop.hub_folder import is_hub_folder
from moe.interop.importing import read_hf_config


def read_source(init_from: str, run_dir: str | None) -> dict[str, Mapping[str, Any]]:
    """{section: keys} of `init_from`, for `moe.config.compose`; of the run's own newest checkpoint where `init_from` is
    gone: a run that has checkpoints goes on without it. Raises UserError."""
    if not init_from:
        return {}  # the configuration's rules refuse it
    given = Path(init_from).expanduser()
    if is_hub_folder(given):
        model, router = read_hf_config(given)
        return {
            "model": _plain(model),
            "router": _plain(router),
            "tokenizer": {"kind": "huggingface", "path": str(given.resolve())},
        }
    try:
        folder = candidates(given, "init_from")[0]
    except UserError:
        own = committed(Path(run_dir).expanduser() / CHECKPOINTS) if run_dir else []
        if not own:
            raise
        folder = own[0]
    path = folder / CONFIG
    try:
        saved = migrate(read_saved(path)[1])
    except OSError as error:
        raise UserError(f"init_from={init_from}: {path}: {error.strerror}") from error
    sections: dict[str, Mapping[str, Any]] = {}
    for name in SECTIONS:
        section = saved.get(name)
        if not isinstance(section, Mapping):
            raise UserError(f"init_from={init_from}: {path}: has no section {name}: use another checkpoint")
        sections[name] = section
    sections["tokenizer"] = {"kind": "huggingface", "path": str(tokenizer_folder(folder).resolve())}
    return sections


def _plain(config: object) -> Mapping[str, Any]:
    """A section as YAML has it."""
    plain: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return plain
