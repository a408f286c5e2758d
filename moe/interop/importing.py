"""`moe import`: a Hugging Face folder becomes a model-only checkpoint folder of ours.

moe import checkpoint=HF_DIR run_dir=runs/mixtral
moe generate checkpoint=runs/mixtral prompt='Once'
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from moe.config import Config, ImportConfig, ModelConfig, RouterConfig, TokenizerConfig, TokenizerKind
from moe.config.compose import load_config
from moe.data.tokenizer import load_saved, open_tokenizer
from moe.data.tokenizer_base import Tokenizer
from moe.errors import UserError
from moe.interop.hub_folder import HubFolder
from moe.interop.hub_tokenizer import text_ends
from moe.interop.model_folder import write_model_folder
from moe.plan.counts import count_parameters
from moe.untrusted import read_object

GENERATION = "generation_config.json"


def read_hf_config(folder: Path, ignore_keys: Iterable[str] = ()) -> tuple[ModelConfig, RouterConfig]:
    """What a Hugging Face folder's config.json describes, checked against its files. Raises UserError, OSError."""
    hub = HubFolder(folder, ignore_keys)
    return hub.model, hub.router


def read_hf_tokenizer(folder: Path, tokenizer: str | None = None) -> Tokenizer:
    """The folder's tokenizer, or the folder or SentencePiece model `tokenizer` instead. Raises DataError."""
    path = Path(tokenizer).expanduser() if tokenizer else folder
    kind = TokenizerKind.model_file if path.is_file() else TokenizerKind.huggingface
    return open_tokenizer(TokenizerConfig(kind=kind, path=str(path)))


def model_config(model: ModelConfig, router: RouterConfig, folder: Path) -> Config:
    """A configuration that describes a model alone: the defaults, with the tokenizer inside its `folder`."""
    config: Config = load_config(["tracking=none"])
    inside = TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder.absolute() / "tokenizer"))
    most = model.max_position_embeddings
    train = replace(
        config.train,
        sequence_length=min(config.train.sequence_length, most),
        sample_tokens=min(config.train.sample_tokens, most - 1),
    )
    return replace(config, run_dir=str(folder), model=model, router=router, tokenizer=inside, train=train)


def import_model(
    folder: Path, destination: Path, *, tokenizer: str | None = None, ignore_keys: Iterable[str] = ()
) -> Config:
    """Writes `destination`, a folder that `moe generate` and a run's `init_from` read, and returns its configuration.

    Tensors keep their dtype, and are read one at a time. Raises UserError, OSError; nothing is left half-done.
    """
    hub, there = open_hub_folder(folder, tokenizer=tokenizer, ignore_keys=ignore_keys)
    config = model_config(hub.model, hub.router, destination)
    write_model_folder(destination, hub, there, config)
    return config


def open_hub_folder(
    folder: Path, *, tokenizer: str | None = None, ignore_keys: Iterable[str] = ()
) -> tuple[HubFolder, Tokenizer]:
    """A model and its tokenizer. Raises UserError, OSError."""
    hub = HubFolder(folder, ignore_keys)
    there = read_hf_tokenizer(folder, tokenizer)
    if there.vocab_size > hub.model.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {there.vocab_size} pieces, and vocab_size={hub.model.vocab_size} of "
            "config.json must be no fewer: give the model's own with tokenizer=FOLDER"
        )
    return hub, there


def run_import(config: ImportConfig) -> str:
    """Imports, and says what was imported. Raises UserError, OSError."""
    folder, destination = Path(config.checkpoint).expanduser(), Path(config.run_dir).expanduser()
    stated = _stated_ends(folder)
    imported = import_model(folder, destination, tokenizer=config.tokenizer, ignore_keys=config.ignore_keys)
    known = text_ends(load_saved(destination / "tokenizer"))
    others = [one for one in stated if one not in known]
    ids = ", ".join(map(str, others))
    note = f"; {folder / GENERATION} ends texts at {ids} too, and nothing here does" if others else ""
    total, active = count_parameters(imported)
    each = f"{total:,} parameters" if total == active else f"{total:,} parameters, {active:,} active"
    return f"{destination}: {each}; `moe generate checkpoint={destination} prompt='Once'` continues a text{note}"


def _stated_ends(folder: Path) -> list[int]:
    """The tokens at which transformers ends the model's texts. Raises UserError."""
    if not (folder / GENERATION).is_file():
        return []
    stated = read_object(folder / GENERATION, "copy it again").values.get("eos_token_id")
    return [one for one in (stated if isinstance(stated, list) else [stated]) if type(one) is int]
