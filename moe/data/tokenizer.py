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
from moe.data.added_tokens import with_special_tokens
from moe.data.find import expanded
from moe.data.huggingface_tokenizer import HuggingFaceTokenizer
from moe.data.readers import DataError
from moe.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moe.data.tokenizer_base import INFO_FILE, TEMPLATE_FILE, Tokenizer
from moe.errors import UserError, shown
from moe.untrusted import is_count, read_object, read_small

SAVED_FILES = r"tokenizer\.(model|json)"  # names, never paths: the folder may be somebody else's
LARGEST_MODEL = 1 << 28  # bytes; vocabularies of 256,000 pieces take 35 MB
LARGEST_TEMPLATE = 1 << 20
MAX_PIECES = 10**8


def load_saved(folder: Path) -> Tokenizer:
    """Reads what `Tokenizer.save` wrote. Raises DataError when a file is missing or its content has changed."""
    path = folder / INFO_FILE
    try:
        info = read_object(path, "restore the folder")
        file, fingerprint = info.text("file", SAVED_FILES), info.text("fingerprint", "[0-9a-f]{64}")
        size = info.count("vocab_size", 1, MAX_PIECES)
        bos, eos = (info.count(key, at_most=size - 1) for key in ("bos_id", "eos_id"))
        # Folders of earlier releases don't state it.
        has_bos = bos != eos
        if "has_bos" in info.values:
            has_bos = info.take("has_bos", lambda value: isinstance(value, bool), "true or false")
        model = read_small(folder / file, LARGEST_MODEL)
    except OSError as error:
        raise DataError(f"{folder}: holds no saved tokenizer ({error})") from error
    except UserError as error:
        raise DataError(str(error)) from error
    where = str(folder / file)
    if file == HuggingFaceTokenizer.file_name:
        tokenizer: Tokenizer = HuggingFaceTokenizer(model, bos if has_bos else None, eos, where)
    else:
        tokenizer = SentencePieceTokenizer(model, where)
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"{where}: its content is not what was saved (SHA-256 differs)")
    for key, there in (
        ("vocab_size", tokenizer.vocab_size),
        ("bos_id", tokenizer.bos_id),
        ("eos_id", tokenizer.eos_id),
    ):
        if info.values[key] != there:
            raise DataError(f"{path}: {key}={info.values[key]} must be {there}, as in {file}; restore the folder")
    tokenizer.chat_template = _chat_template(folder, {})
    return tokenizer


def _chat_template(folder: Path, names: dict[str, Any]) -> str | None:
    """The template in a file of its own, or in tokenizer_config.json's `names`. Raises DataError."""
    path = folder / TEMPLATE_FILE
    try:
        return read_small(path, LARGEST_TEMPLATE).decode() if path.is_file() else _as_template(names, folder)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: unreadable ({error})") from error
    except UserError as error:
        raise DataError(str(error)) from error


def _as_template(names: dict[str, Any], folder: Path) -> str | None:
    stated = names.get("chat_template")
    if isinstance(stated, list):  # several, by name
        named = [one for one in stated if isinstance(one, dict) and one.get("name") == "default"]
        stated = named[-1].get("template") if named else None
    if stated is not None and not isinstance(stated, str):
        raise DataError(f"{folder / 'tokenizer_config.json'}: chat_template must be text or a list with a `default`")
    return stated


def open_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Opens an existing tokenizer: every kind but `sentencepiece`, which is trained; with its added tokens. Raises
    DataError."""
    tokenizer = _open(config)
    return with_special_tokens(tokenizer, config.add_special_tokens) if config.add_special_tokens else tokenizer


def _open(config: TokenizerConfig) -> Tokenizer:
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
        return read_small(path, LARGEST_MODEL)
    except OSError as error:
        raise DataError(f"tokenizer.path={path}: {error.strerror}") from error
    except UserError as error:
        raise DataError(f"tokenizer.path={error}") from error


def _open_huggingface(folder: Path) -> Tokenizer:
    """A tokenizer folder: tokenizer.json and the files that name its special tokens, or a SentencePiece model alone."""
    where = f"tokenizer.path={folder}"
    if not folder.is_dir():
        raise DataError(f"{where}: must be a local folder with a tokenizer.json (nothing is downloaded)")
    if (folder / INFO_FILE).is_file():  # a checkpoint's
        return load_saved(folder)
    names: dict[str, Any] = {}
    for file_name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second overrides the first
        names |= {key: value for key, value in _object(folder / file_name).items() if value}
    if not (folder / "tokenizer.json").is_file():
        if (folder / "tokenizer.model").is_file():
            return _open_sentencepiece(folder, names, where)
        raise DataError(f"{where}: holds neither tokenizer.json nor tokenizer.model")
    model = _read(folder / "tokenizer.json")
    bos, eos = (_special_id(model, names.get(key)) for key in ("bos_token", "eos_token"))
    tokenizer = HuggingFaceTokenizer(model, bos, eos, where)
    tokenizer.chat_template = _chat_template(folder, names)
    return tokenizer


def _object(path: Path) -> dict[str, Any]:
    """A JSON file's object; {} where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: broken JSON: must be an object")
    return found


def _open_sentencepiece(folder: Path, names: dict[str, Any], where: str) -> SentencePieceTokenizer:
    """tokenizer.model with the folder's chat template. Tokens that other files add need a tokenizer.json."""
    tokenizer = SentencePieceTokenizer(_read(folder / "tokenizer.model"), where)
    tokenizer.chat_template = _chat_template(folder, names)
    convert = "save a tokenizer.json beside it with transformers, which has them"
    stated, last = _object(folder / "added_tokens.json"), tokenizer.vocab_size - 1
    added = [text for text, one in stated.items() if not is_count(one, last) or tokenizer.piece(one) != text]
    if added:
        raise DataError(f"{where}: tokenizer.model lacks {shown(added[0])} of added_tokens.json: {convert}")
    end = names.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if end is not None and end != tokenizer.piece(tokenizer.eos_id):
        raise DataError(f"{where}: eos_token={shown(str(end))} is not the end of tokenizer.model: {convert}")
    return tokenizer


def _special_id(model: bytes, name: Any) -> int | None:
    """The id of a special token, given by its text or by a mapping with its `content`; None if there is none."""
    text = name.get("content") if isinstance(name, dict) else name
    try:
        added = json.loads(model).get("added_tokens", [])
        return next((token["id"] for token in added if token["content"] == text), None)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None  # HuggingFaceTokenizer raises the error for a broken file
