"""Hugging Face's tokenizer.json, read by the `tokenizers` library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moe.data.long_text import SPACE, byte_level_parts
from moe.data.readers import DataError
from moe.data.shards import token_dtype
from moe.data.tokenizer_base import BYTE_PIECE, PARTS, bos_and_eos, save_files, saved_files
from moe.errors import shown


class HuggingFaceTokenizer:
    """A `tokenizer.json` read by the `tokenizers` library: byte-level BPE, SentencePiece-style with byte pieces, or a
    closed vocabulary (WordLevel whose `unk_token` is none of its pieces), where text outside it is a DataError."""

    chat_template: str | None = None
    file_name = "tokenizer.json"

    def __init__(self, model: bytes, bos: int | None, eos: int | None, where: str) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise DataError(f"{where}: needs the `tokenizers` package: pip install tokenizers") from error
        try:
            self._backend = Backend.from_str(model.decode("utf-8"))
            self._json = json.loads(model)
            self._behind_special = self._backend
            if (words := self._json.get("pre_tokenizer")) != (behind := _without_first_space(words)):
                self._behind_special = Backend.from_str(json.dumps(self._json | {"pre_tokenizer": behind}))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{where}: not a tokenizer.json: {str(error).splitlines()[0]}") from error
        for backend in (self._backend, self._behind_special):
            backend.encode_special_tokens = True  # "</s>" inside a document is text and must not become the EOS id
            backend.no_truncation()
            backend.no_padding()
        self._model, self._where = model, where
        added = self._json.get("added_tokens", [])
        self._added = {token["id"]: (token["content"], token["special"]) for token in added}
        self.stripping: Mapping[str, tuple[bool, bool]] = {
            token["content"]: (bool(token.get("lstrip")), bool(token.get("rstrip")))
            for token in added
            if token["special"]
        }
        if any(self._backend.token_to_id(text) != number for number, (text, _) in self._added.items()):
            raise DataError(f"{where}: added_tokens states an id that isn't the token's: copy it again")
        self.bos_id, self.eos_id = bos_and_eos(bos, eos, where)
        self.has_bos = bos is not None
        self.fingerprint = hashlib.sha256(model + f"|{self.bos_id}|{self.eos_id}".encode()).hexdigest()
        self.vocab_size = max(self.vocabulary().values()) + 1
        self._dtype = token_dtype(self.vocab_size)
        decoder = json.dumps(self._json.get("decoder"))
        self._byte_level = '"ByteLevel"' in decoder
        if not self._byte_level and '"ByteFallback"' not in decoder and not self._is_closed():
            raise DataError(
                f"{where}: must be byte-level, have byte fallback, or be a WordLevel model without its unk_token among "
                "its pieces: otherwise text would be lost"
            )

    def _is_closed(self) -> bool:
        """Whether the library refuses text that its pieces don't cover."""
        model = self._json["model"]
        return model.get("type") == "WordLevel" and model.get("unk_token") not in self._backend.get_vocab()

    def __reduce__(self) -> tuple[Any, ...]:
        made_of = self._model, self.bos_id if self.has_bos else None, self.eos_id, self._where
        return HuggingFaceTokenizer, made_of, {"chat_template": self.chat_template, "fingerprint": self.fingerprint}

    def encode(self, text: str) -> list[int]:
        """Raises DataError where a closed vocabulary has no pieces for it, as does `encode_many`."""
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{shown(text)}: has characters that are in none of the tokenizer's pieces") from error

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in self._backend.encode_batch(texts, add_special_tokens=False)]
        except Exception:
            return [self.encode(text) for text in texts]  # raises for the text that has no pieces

    def encode_raw(self, texts: list[str], behind_special: bool = False) -> list[bytes]:
        backend = self._behind_special if behind_special else self._backend
        try:
            encoded = [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception:
            encoded = self.encode_many(texts)  # raises for the text that has no pieces
        return [np.array(ids, self._dtype).tobytes() for ids in encoded]

    def encode_long(self, text: str) -> Iterator[list[int]]:
        parts = byte_level_parts(text, self._backend, self._json)
        while batch := [*islice(parts, PARTS)]:
            yield from self.encode_many(batch)

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

    def special_tokens(self) -> dict[str, int]:
        return {content: token_id for token_id, (content, special) in self._added.items() if special}

    def vocabulary(self) -> dict[str, int]:
        """{piece: id}, added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, token_id in self.vocabulary().items():
            if token_id in self._added:
                content, special = self._added[token_id]
                sizes[token_id] = 0 if special else len(content.encode())
            elif self._byte_level:
                sizes[token_id] = len(piece)  # one character of the byte-level alphabet per byte
            else:
                sizes[token_id] = 1 if BYTE_PIECE.fullmatch(piece) else len(piece.replace(SPACE, " ").encode())
        return sizes

    def files(self) -> dict[str, bytes]:
        return saved_files(self, self.file_name, self._model)

    def save(self, folder: Path) -> None:
        save_files(folder, self.files())


def _without_first_space(part: Any) -> Any:
    """The pre-tokenizer for text behind a special token: a Metaspace with `prepend_scheme` "first" puts a space at the
    start of the whole text only."""
    if isinstance(part, list):
        return [_without_first_space(one) for one in part]
    if not isinstance(part, dict):
        return part
    changed = {"prepend_scheme": "never"} if part.get("prepend_scheme") == "first" else {}
    return {name: _without_first_space(value) for name, value in part.items()} | changed


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's printable character for each byte: Latin-1's printable ones, then U+0100 onward for the rest."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
