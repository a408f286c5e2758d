"""Word by word, a SentencePiece model gives the ids that it gives for the whole text."""

import pickle
import random

import numpy as np
import pytest
import sentencepiece

from moe.config import TokenizerConfig, TokenizerKind
from moe.data import word_encoding
from moe.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moe.data.shards import token_dtype
from moe.data.stdlib import arithmetic
from moe.data.tokenizer import open_tokenizer
from moe.data.tokenizer_training import train_sentencepiece

TEXTS = [text for text, _ in zip(arithmetic(), range(200), strict=False)]
CHARACTERS = [
    *" \n\t\r\0\x07\x1b\x7f0123456789.,'\"-_/<>(){}ab", "  ", "    ", "\n\n", " \n", "\r\n", "é", "e\u0301", "ﬁ", "中",
    "文", "😀",
    "👩‍👩‍👧", "\u00a0", "\u2028", "\u3000", "\ufeff", "\u200b", "\U0010ffff", "the", " the", " of", "ing", "ing ",
    "1,234", "▁", "<s>", "</s>", "<unk>", "<0x0A>", "don't", "def f(x):\n\treturn x",
]  # fmt: skip


def made(texts=TEXTS, **settings):
    """A model by SentencePiece's own trainer."""
    import io

    writer = io.BytesIO()
    settings = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "minloglevel": 2} | settings
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=writer, **settings)
    return SentencePieceTokenizer(writer.getvalue(), "made")


PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "character_coverage": 1.0}


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "mistral": open_tokenizer(TokenizerConfig(kind=TokenizerKind.mistral)),
        "trained": train_sentencepiece([*TEXTS, *CHARACTERS], 500, print),
        "whitespace": made(allow_whitespace_only_pieces=True, **PLAIN),
        "symbols": made(user_defined_symbols=["<|user|>", "12 3", "ing"], **PLAIN),
        "across": made(split_by_whitespace=False, **PLAIN),
        "suffix": made(treat_whitespace_as_suffix=True, **PLAIN),
        "nmt_nfkc": made(),
        "unigram": made(model_type="unigram", **PLAIN),
    }


def fuzzed(dice):
    length = dice.randrange(60)
    anything = (chr(dice.choice([dice.randrange(128), dice.randrange(0xD800), dice.randrange(0xE000, 0x110000)])),)
    return "".join(dice.choice([*CHARACTERS, *anything, dice.choice(TEXTS)[:20]]) for _ in range(length))


@pytest.mark.parametrize(
    ("name", "is_fast"),
    [("mistral", True), ("trained", True), ("whitespace", True), ("symbols", False), ("across", False),
     ("suffix", False), ("nmt_nfkc", False), ("unigram", False)],
)  # fmt: skip
def test_ids_are_those_of_sentencepiece(tokenizers, name, is_fast, monkeypatch):
    monkeypatch.setattr(word_encoding, "MOST_WORDS", 500)  # so that the table is emptied
    monkeypatch.setattr(word_encoding, "GROUP", 2000)  # so that texts are of several groups
    tokenizer, dice = tokenizers[name], random.Random(0)
    assert (tokenizer._word_encoder is not None) == is_fast
    texts = ["", " ".join(TEXTS), *TEXTS[:20], *(fuzzed(dice) for _ in range(1500))]
    dtype = token_dtype(tokenizer.vocab_size)
    found = [np.frombuffer(ids, dtype).tolist() for ids in tokenizer.encode_raw(texts)]
    assert found == tokenizer.encode_many(texts)
    assert not is_fast or len(tokenizer._word_encoder._ids) <= 500


def test_user_defined_symbols_without_spaces_are_words(tokenizers):
    tokenizer = made(user_defined_symbols=["<|user|>", "\n\n"], **PLAIN)
    assert tokenizer._word_encoder is not None
    texts = ["a<|user|>b\n\n\nc <|user|> \n\n x", "\n\n", "<|user|>"]
    assert [np.frombuffer(ids, "<u2").tolist() for ids in tokenizer.encode_raw(texts)] == tokenizer.encode_many(texts)


def test_a_model_that_differs_on_the_probe_is_not_encoded_by_words(tokenizers, monkeypatch):
    model = tokenizers["mistral"]._model
    monkeypatch.setattr(word_encoding.WordEncoder, "encode", lambda self, texts: [b""] * len(texts))
    assert SentencePieceTokenizer(model, "again")._word_encoder is None


def test_a_tokenizer_sent_to_another_process_is_the_same(tokenizers):
    tokenizers["trained"].chat_template = "{{ messages }}"
    copy = pickle.loads(pickle.dumps(tokenizers["trained"]))
    assert copy.chat_template == "{{ messages }}"
    assert (copy.fingerprint, copy.encode_raw(TEXTS)) == (
        tokenizers["trained"].fingerprint,
        tokenizers["trained"].encode_raw(TEXTS),
    )
