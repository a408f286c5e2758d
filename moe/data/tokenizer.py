"""Text to token ids and back, exactly: SentencePiece models, Hugging Face's tokenizer.json, Mistral's own.

A model trained here is lossless: `decode(encode(text)) == text` for every string, newlines, tabs, runs of spaces and
any Unicode included. Existing tokenizers keep their own normalisation (Mistral's adds a space before a text when it
encodes and removes it when it decodes). Nothing is unpickled and no code of a tokenizer folder is run.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from moe.config import TokenizerConfig, TokenizerKind
from moe.data.find import expanded
from moe.data.formats import special
from moe.data.huggingface_tokenizer import HuggingFaceTokenizer
from moe.data.readers import DataError
from moe.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moe.data.tokenizer_base import INFO_FILE, Tokenizer


def load_saved(folder: Path) -> Tokenizer:
    """Reads what `Tokenizer.save` wrote. Raises DataError when a file is missing or its content has changed."""
    try:
        info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
        model = (folder / info["file"]).read_bytes()
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: holds no saved tokenizer ({INFO_FILE}: {error})") from error
    where = str(folder / info["file"])
    if info["file"] == HuggingFaceTokenizer.file_name:
        tokenizer: Tokenizer = HuggingFaceTokenizer(model, info["bos_id"], info["eos_id"], where)
    else:
        tokenizer = SentencePieceTokenizer(model, where)
    if tokenizer.fingerprint != info["fingerprint"]:
        raise DataError(f"{where}: its content is not what was saved (SHA-256 differs)")
    return tokenizer


def open_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Opens an existing tokenizer: every kind but `sentencepiece`, which is trained. Raises DataError."""
    if config.kind is TokenizerKind.mistral:
        path = _mistral_model()
    else:
        path = expanded("tokenizer.path", config.path or "")
    if config.kind is TokenizerKind.huggingface:
        return _open_huggingface(path)
    if path.suffix == ".json":
        raise DataError(f"tokenizer.path={path}: not a SentencePiece model; use tokenizer=huggingface with its folder")
    return SentencePieceTokenizer(_read(path), f"tokenizer.path={path}")


def count_pieces(config: TokenizerConfig) -> int:
    """Token ids of an existing tokenizer: the rows that a model needs for it. Raises DataError."""
    return open_tokenizer(config).vocab_size


def tokenizer_files(config: TokenizerConfig) -> list[Path]:
    """The files that an existing tokenizer is read from, to check cheaply whether it changed."""
    if config.kind is TokenizerKind.mistral:
        return [_mistral_model()]
    if config.path is None:
        return []
    path = expanded("tokenizer.path", config.path)
    return sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]


def _mistral_model() -> Path:
    """mistral-common's model file, found without importing the package (an import takes a second)."""
    spec = importlib.util.find_spec("mistral_common")
    places = list(spec.submodule_search_locations or []) if spec else []
    paths = [path for place in places if (path := Path(place) / "data" / "tokenizer.model.v1").is_file()]
    if not paths:
        raise DataError("tokenizer.kind=mistral: no tokenizer.model.v1 found: pip install mistral-common")
    return paths[0]


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"tokenizer.path={path}: is {special(path) or 'a folder'}: give a file")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer.path={path}: {error.strerror}") from error


def _open_huggingface(folder: Path) -> Tokenizer:
    """A tokenizer folder: tokenizer.json and the files that name its special tokens, or a SentencePiece model alone."""
    where = f"tokenizer.path={folder}"
    if not folder.is_dir():
        raise DataError(f"{where}: must be a local folder with a tokenizer.json (nothing is downloaded)")
    if not (folder / "tokenizer.json").is_file():
        if (folder / "tokenizer.model").is_file():
            return SentencePieceTokenizer(_read(folder / "tokenizer.model"), where)
        raise DataError(f"{where}: holds neither tokenizer.json nor tokenizer.model")
    names: dict[str, Any] = {}
    for file_name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second overrides the first
        if (folder / file_name).is_file():
            try:
                names |= {key: value for key, value in json.loads(_read(folder / file_name)).items() if value}
            except (ValueError, AttributeError) as error:
                raise DataError(f"{folder / file_name}: broken JSON: {error}") from error
    model = _read(folder / "tokenizer.json")
    bos, eos = (_special_id(model, names.get(key)) for key in ("bos_token", "eos_token"))
    return HuggingFaceTokenizer(model, bos, eos, where)


def _special_id(model: bytes, name: Any) -> int | None:
    """The id of a special token, given by its text or by a mapping with its `content`; None if there is none."""
    text = name.get("content") if isinstance(name, dict) else name
    try:
        added = json.loads(model).get("added_tokens", [])
        return next((token["id"] for token in added if token["content"] == text), None)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None  # HuggingFaceTokenizer raises the error for a broken file
