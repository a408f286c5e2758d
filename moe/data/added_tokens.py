"""A tokenizer with special tokens added behind its last id, as a chat template may need them.

They are special tokens like </s>: only a template makes them, their text inside a document is text, and they are saved,
exported and read back with the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from moe.data.huggingface_tokenizer import HuggingFaceTokenizer
from moe.data.readers import DataError
from moe.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moe.data.tokenizer_base import Tokenizer

KEY = "tokenizer.add_special_tokens"


def with_special_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """`tokenizer` with `tokens` as its last ids, in their order; itself if they are that already.

    Raises DataError for a token that it has elsewhere.
    """
    first = tokenizer.vocab_size - len(tokens)
    there = tokenizer.special_tokens()
    if all(there.get(token) == first + number for number, token in enumerate(tokens)):
        return tokenizer
    if isinstance(tokenizer, SentencePieceTokenizer):
        added: Tokenizer = _sentencepiece(tokenizer, tokens)
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        added = _huggingface(tokenizer, tokens)
    added.chat_template = tokenizer.chat_template
    specials = added.special_tokens()
    assert [specials.get(token) for token in tokens] == [*range(tokenizer.vocab_size, added.vocab_size)]
    return added


def _sentencepiece(tokenizer: SentencePieceTokenizer, tokens: Sequence[str]) -> SentencePieceTokenizer:
    from sentencepiece import sentencepiece_model_pb2  # loads protobuf

    messages: Any = sentencepiece_model_pb2  # made at run time: type checkers see nothing in it
    parsed = messages.ModelProto.FromString(tokenizer.files()[tokenizer.file_name])
    _check_new({piece.piece: index for index, piece in enumerate(parsed.pieces)}, tokens)
    for token in tokens:
        parsed.pieces.add(piece=token, score=0.0, type=messages.ModelProto.SentencePiece.CONTROL)
    parsed.trainer_spec.vocab_size = len(parsed.pieces)
    return SentencePieceTokenizer(parsed.SerializeToString(), KEY)


def _huggingface(tokenizer: HuggingFaceTokenizer, tokens: Sequence[str]) -> HuggingFaceTokenizer:
    _check_new(tokenizer.vocabulary(), tokens)
    content = json.loads(tokenizer.files()[tokenizer.file_name])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [
        *content.get("added_tokens", []),
        *({"id": tokenizer.vocab_size + number, "content": token, **flags} for number, token in enumerate(tokens)),
    ]
    model = json.dumps(content, ensure_ascii=False).encode()
    return HuggingFaceTokenizer(model, tokenizer.bos_id if tokenizer.has_bos else None, tokenizer.eos_id, KEY)


def _check_new(there: dict[str, int], tokens: Sequence[str]) -> None:
    for token in tokens:
        if token in there:
            raise DataError(f"{KEY}={token}: the tokenizer has it already, with id {there[token]}: leave it out")
