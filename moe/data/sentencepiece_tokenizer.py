"""SentencePiece models with byte pieces."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import sentencepiece

from moe.data.long_text import SPACE, LongText
from moe.data.readers import DataError
from moe.data.shards import token_dtype
from moe.data.tokenizer_base import PARTS, bos_and_eos, save_files, saved_files
from moe.data.word_encoding import WordEncoder


class SentencePieceTokenizer:
    """A SentencePiece model with byte fallback: Llama's, Mistral's, or one trained here."""

    chat_template: str | None = None
    stripping: Mapping[str, tuple[bool, bool]] = MappingProxyType({})
    file_name = "tokenizer.model"

    def __init__(self, model: bytes, where: str) -> None:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
            processor.id_to_piece(list(range(processor.get_piece_size())))  # that each is UTF-8
        except (RuntimeError, UnicodeDecodeError) as error:  # its messages may quote bytes of the model
            raise DataError(f"{where}: not a SentencePiece model, or a damaged one: copy it again") from error
        self._model, self._processor, self._where = model, processor, where
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size = processor.get_piece_size()
        self._dtype = token_dtype(self.vocab_size)
        self.bos_id, self.eos_id = bos_and_eos(processor.bos_id(), processor.eos_id(), where)
        self.has_bos = processor.bos_id() >= 0
        self._space_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        if not all(processor.is_byte(token_id) for token_id in self._space_ids):
            raise DataError(
                f"{where}: has no byte pieces, so characters outside its vocabulary would be lost; use another model"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (self._model, self._where), {"chat_template": self.chat_template}

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0]

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return self._encode_many(texts, self._processor)

    def encode_raw(self, texts: list[str], behind_special: bool = False) -> list[bytes]:
        encoder = self._word_encoder
        if encoder is None:
            return [np.array(ids, self._dtype).tobytes() for ids in self.encode_many(texts)]
        by_model = map(encoder.packed, self.encode_many([text for text in texts if SPACE in text]))
        by_words = iter(encoder.encode([text for text in texts if SPACE not in text]))
        return [next(by_model if SPACE in text else by_words) for text in texts]

    def encode_long(self, text: str) -> Iterator[list[int]]:
        parts = self._long_text.parts(text)
        yield from self._encode_many([*islice(parts, 1)], self._processor)
        while batch := [*islice(parts, PARTS)]:
            yield from self._encode_many(batch, self._long_text.inside)

    @cached_property
    def _word_encoder(self) -> WordEncoder | None:
        return WordEncoder.of(self._long_text, self._processor, self._dtype.itemsize)

    @cached_property
    def _long_text(self) -> LongText:
        return LongText(self._model, self._processor)

    def _encode_many(self, texts: list[str], first: sentencepiece.SentencePieceProcessor) -> list[list[int]]:
        """`first` encodes each text up to its first '▁'."""
        if any(SPACE in text for text in texts):
            return [self._encode_with_space_sign(text, first) for text in texts]
        return first.encode(texts, num_threads=1)  # type: ignore[return-value]

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

    def special_tokens(self) -> dict[str, int]:
        ids = range(self.vocab_size)
        return {str(self._processor.id_to_piece(one)): one for one in ids if self._processor.is_control(one)}

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
        return saved_files(self, self.file_name, self._model)

    def save(self, folder: Path) -> None:
        save_files(folder, self.files())
