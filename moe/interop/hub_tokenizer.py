"""A tokenizer as the files that transformers reads: tokenizer.json, tokenizer_config.json, special_tokens_map.json.

A SentencePiece model becomes a tokenizer.json with the same ids for every text without special tokens: BPE whose
merges are ranked by SentencePiece's scores, spaces written as ▁ by the normalizer, no pre-tokenizer, byte fallback.
(transformers' own conversion of such a model differs in runs of spaces.)
"""

from __future__ import annotations

import json
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as protobuf

from moe.config import TemplateName
from moe.data.chat_template import open_template
from moe.data.chat_templates import OURS
from moe.data.long_text import SPACE
from moe.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moe.data.tokenizer_base import TEMPLATE_FILE, Tokenizer
from moe.errors import UserError

JSON_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
BPE = 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type


def hub_tokenizer_files(tokenizer: Tokenizer, max_length: int) -> dict[str, bytes]:
    """{file name: content}; `max_length` is the model's number of positions. Raises UserError for a SentencePiece model
    that a tokenizer.json can't equal."""
    files = tokenizer.files()
    kept = {name: files[name] for name in (MODEL_FILE, JSON_FILE, TEMPLATE_FILE) if name in files}
    if isinstance(tokenizer, SentencePieceTokenizer):
        kept[JSON_FILE] = json.dumps(sentencepiece_as_json(files[MODEL_FILE]), ensure_ascii=False).encode()
    names = _special_names(tokenizer, json.loads(kept[JSON_FILE]))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **names,
    }
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    kept["tokenizer_config.json"] = _json(settings)
    kept["special_tokens_map.json"] = _json(names)
    return kept


def text_ends(tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a text: that of the sequence, and that of an answer in the tokenizer's chat template."""
    if tokenizer.chat_template is None:
        return [tokenizer.eos_id]
    try:
        _, end = open_template(TemplateName.tokenizer, tokenizer).answer_form()
    except UserError:  # an answer's end can't be told from this template
        return [tokenizer.eos_id]
    return [tokenizer.eos_id] if end in (None, tokenizer.eos_id) else [tokenizer.eos_id, end]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _special_names(tokenizer: Tokenizer, model: dict[str, Any]) -> dict[str, str]:
    by_id = {token["id"]: token["content"] for token in model.get("added_tokens", [])}
    by_id |= {index: piece for piece, index in _vocabulary(model).items() if index not in by_id}
    names = {"eos_token": by_id[tokenizer.eos_id]}
    if tokenizer.has_bos or tokenizer.chat_template in OURS.values():  # ours begin with EOS where there is no BOS
        names["bos_token"] = by_id[tokenizer.bos_id]
    unknown = model["model"].get("unk_token")
    return names | ({"unk_token": unknown} if unknown in by_id.values() else {})  # a closed vocabulary has none


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    pieces = model["model"].get("vocab", {})
    return pieces if isinstance(pieces, dict) else {piece: index for index, (piece, _) in enumerate(pieces)}


def sentencepiece_as_json(model: bytes) -> dict[str, Any]:
    """A SentencePiece BPE model as the content of a tokenizer.json, which adds the BOS piece before a text, as every
    document here begins. Raises UserError for a model that it can't equal."""
    parsed = check_sentencepiece(model)
    pieces = parsed.pieces
    vocabulary = {piece.piece: index for index, piece in enumerate(pieces)}
    named = {piece.type: piece.piece for piece in reversed(pieces)}
    bos = pieces[parsed.trainer_spec.bos_id].piece
    added = [
        {
            "id": index,
            "content": piece.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": piece.type != USER_DEFINED,
        }
        for index, piece in enumerate(pieces)
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    prefixed = parsed.normalizer_spec.add_dummy_prefix
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": SPACE}] if prefixed else []), replace],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(bos), _sequence("A", 0)],
            "pair": [_special(bos), _sequence("A", 0), _special(bos, 1), _sequence("B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [vocabulary[bos]], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if prefixed else [])],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": named[UNKNOWN],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(parsed),
        },
    }


def _special(piece: str, part: int = 0) -> dict[str, Any]:
    return {"SpecialToken": {"id": piece, "type_id": part}}


def _sequence(name: str, part: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": part}}


def check_sentencepiece(model: bytes) -> Any:
    """The parsed model. Raises UserError for one whose ids no other program's BPE gives."""
    parsed: Any = protobuf.ModelProto()  # pyright: ignore[reportAttributeAccessIssue] (made at import)
    parsed.ParseFromString(model)
    spec, normalizer = parsed.trainer_spec, parsed.normalizer_spec
    reason = None
    if spec.model_type != BPE:
        reason = "it is no BPE model"
    elif normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        reason = f"its normalisation ({normalizer.name}) changes the text"
    elif not normalizer.escape_whitespaces or spec.treat_whitespace_as_suffix:
        reason = "it writes spaces in another way than as ▁ before a word"
    elif normalizer.add_dummy_prefix and any(piece.type == USER_DEFINED for piece in parsed.pieces):
        reason = "it has user-defined pieces and adds a space before a text"
    elif spec.bos_id < 0:
        reason = "it has no BOS piece"
    if reason:
        raise UserError(f"the tokenizer can't be written for other programs with the same ids: {reason}")
    return parsed


def _merges(parsed: Any) -> list[list[str]]:
    """Every pair of pieces that make a piece, that with the highest score first.

    Of equal scores SentencePiece takes the leftmost in the text, a tokenizer.json the one with the better rank. Runs of
    spaces in Mistral's model all have one score and grow from the left, so pairs with the longer left piece come first.
    """
    scores = {piece.piece: piece.score for piece in parsed.pieces if piece.type in (NORMAL, UNUSED)}
    found = []
    for piece, score in scores.items():
        for at in range(1, len(piece)):
            if piece[:at] in scores and piece[at:] in scores:
                found.append((-score, -at, piece))
    return [[piece[:-at], piece[-at:]] for _, at, piece in sorted(found)]
