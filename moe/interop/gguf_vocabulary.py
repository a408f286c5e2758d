"""A SentencePiece model as the vocabulary of a GGUF file."""

from __future__ import annotations

from typing import Any

from sentencepiece import sentencepiece_model_pb2 as protobuf

from moe.data.sentencepiece_tokenizer import SentencePieceTokenizer

UNUSED = 5  # TokenType, whose numbers are SentencePiece's own


def add_vocabulary(writer: Any, tokenizer: SentencePieceTokenizer, rows: int) -> None:
    """Adds pieces, scores and types to a `gguf.GGUFWriter`; `rows` is the model's vocabulary, which may be larger."""
    parsed: Any = protobuf.ModelProto()  # pyright: ignore[reportAttributeAccessIssue] (made at import)
    parsed.ParseFromString(tokenizer.files()[tokenizer.file_name])
    pieces = [(piece.piece.encode(), piece.score, piece.type) for piece in parsed.pieces]
    pieces += [(f"[PAD{index}]".encode(), -1000.0, UNUSED) for index in range(len(pieces), rows)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece for piece, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(parsed.trainer_spec.unk_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(parsed.normalizer_spec.add_dummy_prefix)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
