"""Text to token ids and back, exactly: SentencePiece models, Hugging Face's tokenizer.json, Mistral's own.

A model trained here is lossless: `decode(encode(text)) == text` for every string, newlines, tabs, runs of spaces and
any Unicode included. Existing tokenizers keep their own normalisation (Mistral's adds a space before a text when it
encodes and removes it when it decodes). Nothing is unpickled and no code of a tokenizer folder is run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece

from moe.config import TokenizerConfig, TokenizerKind
from moe.data.long_text import SPACE, LongText, byte_level_parts
from moe.data.readers import DataError

INFO_FILE = "moe_tokenizer.json"
PARTS = 8  # of a long text, encoded at once
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer(Protocol):
    """Every stored document begins with `bos_id` and ends with `eos_id`; ids are 0 … vocab_size − 1."""

    vocab_size: int
    bos_id: int
    eos_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without BOS and EOS; text that looks like a special token stays text."""
        ...

    def encode_many(self, texts: list[str], threads: int) -> list[list[int]]: ...

    def encode_long(self, text: str, threads: int) -> Iterator[list[int]]:
        """The ids of `encode`, part by part, so that memory doesn't grow with them (where the tokenizer allows it)."""
        ...

    def decode(self, ids: list[int]) -> str: ...

    def piece(self, token_id: int) -> str:
        """One id as readable text; `<0xE4>` for a byte that is only part of a character."""
        ...

    def token_bytes(self) -> np.ndarray:
        """[V] int64: the UTF-8 bytes of text that each id stands for; 0 for special tokens."""
        ...

    def files(self) -> dict[str, bytes]:
        """{file name: content}: the files that `load_saved` reads."""
        ...

    def save(self, folder: Path) -> None:
        """Writes `files` into `folder`."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model with byte fallback: Llama's, Mistral's, or one trained here."""

    file_name = "tokenizer.model"

    def __init__(self, model: bytes, where: str) -> None:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise DataError(f"{where}: not a SentencePiece model") from error
        self._model, self._processor = model, processor
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size = processor.get_piece_size()
        self.bos_id, self.eos_id = _bos_and_eos(processor.bos_id(), processor.eos_id(), where)
        self._space_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        if not all(processor.is_byte(token_id) for token_id in self._space_ids):
            raise DataError(
                f"{where}: has no byte pieces, so characters outside its vocabulary would be lost; use another model"
            )

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text], threads=1)[0]

    def encode_many(self, texts: list[str], threads: int) -> list[list[int]]:
        return self._encode_many(texts, threads, self._processor)

    def encode_long(self, text: str, threads: int) -> Iterator[list[int]]:
        parts = self._long_text.parts(text)
        yield from self._encode_many([*islice(parts, 1)], threads, self._processor)
        while batch := [*islice(parts, PARTS)]:
            yield from self._encode_many(batch, threads, self._long_text.inside)

    @cached_property
    def _long_text(self) -> LongText:
        return LongText(self._model, self._processor)

    def _encode_many(
        self, texts: list[str], threads: int, first: sentencepiece.SentencePieceProcessor
    ) -> list[list[int]]:
        """`first` encodes each text up to its first '▁'."""
        if any(SPACE in text for text in texts):
            return [self._encode_with_space_sign(text, first) for text in texts]
        return first.encode(texts, num_threads=threads)  # type: ignore[return-value]

    def _encode_with_space_sign(self, text: str, first: sentencepiece.SentencePieceProcessor) -> list[int]:
        """Encodes a literal '▁' as its three bytes; as a piece it would be decoded to a space."""
        head, *rest = text.split(SPACE)
        ids: list[int] = first.encode(head)  # type: ignore[assignment]
        for part in rest:
            ids += self._space_ids + self._processor.encode(part)  # type: ignore[operator]
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode([int(token_id) for token_id in ids])  # type: ignore[return-value]

    def piece(self, token_id: int) -> str:
        piece = str(self._processor.id_to_piece(int(token_id)))
        if self._processor.is_byte(int(token_id)):
            byte = int(piece[3:5], 16)
            return chr(byte) if byte < 0x80 else piece
        return piece.replace(SPACE, " ")

    def token_bytes(self) -> np.ndarray:
        processor = self._processor
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token_id in range(self.vocab_size):
            if processor.is_byte(token_id):
                sizes[token_id] = 1
            elif not (processor.is_control(token_id) or processor.is_unknown(token_id)):
                sizes[token_id] = len(str(processor.id_to_piece(token_id)).replace(SPACE, " ").encode())
        return sizes

    def files(self) -> dict[str, bytes]:
        return _files(self, self._model)

    def save(self, folder: Path) -> None:
        _save(folder, self.files())


class HuggingFaceTokenizer:
    """A `tokenizer.json` read by the `tokenizers` library: byte-level BPE, or SentencePiece-style with byte pieces."""

    file_name = "tokenizer.json"

    def __init__(self, model: bytes, bos: int | None, eos: int | None, where: str) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise DataError(f"{where}: needs the `tokenizers` package: pip install tokenizers") from error
        try:
            self._backend = Backend.from_str(model.decode("utf-8"))
            self._json = json.loads(model)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{where}: not a tokenizer.json: {str(error).splitlines()[0]}") from error
        self._backend.encode_special_tokens = True  # "</s>" inside a document is text and must not become the EOS id
        self._backend.no_truncation()
        self._backend.no_padding()
        self._model = model
        added = self._json.get("added_tokens", [])
        self._added = {token["id"]: (token["content"], token["special"]) for token in added}
        self.fingerprint = hashlib.sha256(model + f"|{bos}|{eos}".encode()).hexdigest()
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id, self.eos_id = _bos_and_eos(bos, eos, where)
        decoder = json.dumps(self._json.get("decoder"))
        self._byte_level = '"ByteLevel"' in decoder
        if not self._byte_level and '"ByteFallback"' not in decoder:
            raise DataError(f"{where}: must be byte-level or have byte fallback: without it text would be lost")

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: list[str], threads: int) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch(texts, add_special_tokens=False)]

    def encode_long(self, text: str, threads: int) -> Iterator[list[int]]:
        parts = byte_level_parts(text, self._backend, self._json)
        while batch := [*islice(parts, PARTS)]:
            yield from self.encode_many(batch, threads)

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode([int(token_id) for token_id in ids], skip_special_tokens=True)

    def piece(self, token_id: int) -> str:
        if token_id in self._added:
            return self._added[token_id][0]
        piece = self._backend.id_to_token(int(token_id)) or ""
        if self._byte_level:
            data = bytes(byte for character in piece if (byte := BYTE_OF.get(character)) is not None)
        elif match := BYTE_PIECE.fullmatch(piece):
            data = bytes([int(match[1], 16)])
        else:
            return piece.replace(SPACE, " ")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in data)

    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, token_id in self._backend.get_vocab(with_added_tokens=True).items():
            if token_id in self._added:
                content, special = self._added[token_id]
                sizes[token_id] = 0 if special else len(content.encode())
            elif self._byte_level:
                sizes[token_id] = len(piece)  # one character of the byte-level alphabet per byte
            else:
                sizes[token_id] = 1 if BYTE_PIECE.fullmatch(piece) else len(piece.replace(SPACE, " ").encode())
        return sizes

    def files(self) -> dict[str, bytes]:
        return _files(self, self._model)

    def save(self, folder: Path) -> None:
        _save(folder, self.files())


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's printable character for each byte: Latin-1's printable ones, then U+0100 onward for the rest."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


def _bos_and_eos(bos: int | None, eos: int | None, where: str) -> tuple[int, int]:
    """(BOS, EOS); with a tokenizer that has no BOS, documents begin with EOS."""
    if eos is None or eos < 0:
        raise DataError(f"{where}: has no end-of-sequence token, which every document needs at its end")
    return (eos if bos is None or bos < 0 else bos), eos


def _files(tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer, model: bytes) -> dict[str, bytes]:
    info = {"file": tokenizer.file_name, "fingerprint": tokenizer.fingerprint}
    info |= {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    return {tokenizer.file_name: model, INFO_FILE: (json.dumps(info, indent=1) + "\n").encode()}


def _save(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


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
        path = Path(config.path or "").expanduser()
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
    path = Path(config.path).expanduser()
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
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer.path={path}: {error.strerror}") from error


def _open_huggingface(folder: Path) -> Tokenizer:
    """A tokenizer folder: tokenizer.json and the files that name its special tokens, or a SentencePiece model alone."""
    where = f"tokenizer.path={folder}"
    if not folder.is_dir():
        raise DataError(f"{where}: must be a local folder with a tokenizer.json (nothing is downloaded)")
    if (folder / INFO_FILE).is_file():  # a checkpoint's
        return load_saved(folder)
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
    except ValueError:
        return None  # HuggingFaceTokenizer raises the error for a broken file
    return next((token["id"] for token in added if token["content"] == text), None)
