"""A tokenizer.json with a changed value ends in one line where it is opened, or works; a closed vocabulary refuses what
its pieces don't cover."""

import json
import random

import pytest

from moe.config import TokenizerConfig, TokenizerKind
from moe.data.readers import DataError
from moe.data.tokenizer import open_tokenizer
from tests.fuzz.mutate import changed
from tests.unit.data.test_tokenizer import huggingface_folder


def test_a_changed_value_is_one_line_or_works(tmp_path):
    text = "12 + 30 = 42 é ▁\n"
    opened, messages = 0, []
    for byte_level in (True, False):
        folder = huggingface_folder(tmp_path / str(byte_level), [text] * 20, byte_level=byte_level)
        files = {path: path.read_bytes() for path in sorted(folder.iterdir())}
        for seed in range(150):
            dice = random.Random(seed)
            victim = dice.choice([folder / "tokenizer.json"] * 4 + [*files])
            victim.write_bytes(changed(dice, files[victim]))
            try:
                tokenizer = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder)))
                opened += 1
                ids = tokenizer.encode_many([text])[0]
                tokenizer.decode(ids)
                assert [*tokenizer.encode_long(text * 10)]
                assert all(isinstance(tokenizer.piece(token), str) for token in ids)
                assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
            except DataError as error:
                messages.append(str(error))
            victim.write_bytes(files[victim])
    assert opened > 20
    assert not any("\n" in message for message in messages)


def closed_folder(folder, unknown="<unk>", **model):
    """Words of one digit each; `unknown` is no piece unless `model` says otherwise."""
    end = {"id": 0, "content": "</s>", "special": True} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    vocabulary = {piece: index for index, piece in enumerate(["</s>", *"0123456789"])}
    content = {
        "version": "1.0",
        "added_tokens": [end],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": unknown} | model,
    }
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder))


def test_a_closed_vocabulary(tmp_path):
    tokenizer = open_tokenizer(closed_folder(tmp_path / "digits"))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (11, 0)
    assert tokenizer.decode(tokenizer.encode("9012")) == "9012"
    for texts in (["1+1"], ["12", "1\n2"], ["</s>"]):
        with pytest.raises(DataError, match="has characters that are in none of the tokenizer's pieces") as error:
            tokenizer.encode_many(texts)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"^1\+1: has characters"):
        tokenizer.encode("1+1")


@pytest.mark.parametrize(("unknown", "model"), [("0", {}), ("<unk>", {"type": "BPE", "merges": [], "unk_token": None})])
def test_a_vocabulary_that_would_lose_text_is_refused(tmp_path, unknown, model):
    with pytest.raises(DataError, match="must be byte-level, have byte fallback, or be a WordLevel model"):
        open_tokenizer(closed_folder(tmp_path / "digits", unknown, **model))
