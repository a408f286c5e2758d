"""Added special tokens get the last ids, stay text inside a text, and come back with the tokenizer."""

from __future__ import annotations

import json

import pytest

from moe.config import TokenizerConfig, TokenizerKind
from moe.config.compose import ConfigError, load_config
from moe.data.added_tokens import with_special_tokens
from moe.data.readers import DataError
from moe.data.tokenizer import load_saved, open_tokenizer
from moe.interop.hub_tokenizer import hub_tokenizer_files

TOKENS = ["<|im_start|>", "<|im_end|>"]
TEXTS = ["<|im_start|>user\n<|im_end|> </s>", "  Über 日本 x = 1\n", "<|im_start|", "<|im_end|><|im_end|>"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A byte-level tokenizer.json without BOS, whose last piece is no special token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken("<|end|>", special=True, normalized=False)],
    )
    backend.train_from_iterator(["hello there, how are you"] * 20, trainer)
    folder = tmp_path_factory.mktemp("byte_level")
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": "{{ 1 }}"}))
    return open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder)))


@pytest.fixture(scope="module")
def mistral():
    return open_tokenizer(TokenizerConfig(kind=TokenizerKind.mistral))


@pytest.fixture(params=["mistral", "byte_level"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_tokens_get_the_last_ids_and_change_no_text(tokenizer, tmp_path):
    added = with_special_tokens(tokenizer, TOKENS)
    size = tokenizer.vocab_size
    assert added.vocab_size == size + 2
    assert added.special_tokens() == tokenizer.special_tokens() | dict(zip(TOKENS, (size, size + 1), strict=True))
    assert added.fingerprint != tokenizer.fingerprint
    assert added.chat_template == tokenizer.chat_template
    assert [added.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert [added.decode(added.encode(text)) for text in TEXTS] == TEXTS
    assert added.piece(size) == TOKENS[0]
    assert added.token_bytes()[size:].tolist() == [0, 0]
    added.save(tmp_path / "saved")
    again = load_saved(tmp_path / "saved")
    assert again.fingerprint == added.fingerprint
    assert again.special_tokens() == added.special_tokens()
    assert with_special_tokens(again, TOKENS) is again


def test_transformers_reads_them(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    added = with_special_tokens(tokenizer, TOKENS)
    for name, content in hub_tokenizer_files(added, 512).items():
        (tmp_path / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == added.vocab_size
    assert theirs.convert_tokens_to_ids(TOKENS) == [added.vocab_size - 2, added.vocab_size - 1]
    assert all(theirs.added_tokens_decoder[added.vocab_size - number].special for number in (1, 2))
    ids = theirs.encode("<|im_start|>hello<|im_end|>", add_special_tokens=False)
    assert (ids[0], ids[-1]) == (added.vocab_size - 2, added.vocab_size - 1)
    assert theirs.decode(ids, skip_special_tokens=True).strip() == "hello"


def test_a_token_that_is_there_is_refused(tokenizer):
    there = next(iter(tokenizer.special_tokens()))
    with pytest.raises(DataError, match=r"tokenizer.add_special_tokens=\S+: the tokenizer has it already, with id \d"):
        with_special_tokens(tokenizer, [there, "<new>"])
    with pytest.raises(DataError, match="has it already"):
        with_special_tokens(with_special_tokens(tokenizer, TOKENS), [*TOKENS, "<new>"])
    with pytest.raises(DataError, match="has it already"):
        with_special_tokens(tokenizer, ["<new>", "h"])


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("['']", "='' must have printable characters and no spaces"),
        ("['<a b>']", "='<a b>' must have printable"),
        ("['a\tb']", "must have printable"),
        ("[<a>,<b>,<a>]", "=<a> must be stated once"),
        ("[" + "a" * 101 + "]", "must have at most 100 characters"),
    ],
)
def test_what_is_no_token_is_refused(value, rule):
    with pytest.raises(ConfigError) as caught:
        load_config(["tokenizer=mistral", "model.vocab_size=32010", f"tokenizer.add_special_tokens={value}"])
    assert f"tokenizer.add_special_tokens{rule}" in str(caught.value) or rule in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_trained_has_none():
    with pytest.raises(ConfigError, match="extends an existing tokenizer, and"):
        load_config(["tokenizer.add_special_tokens=[<|im_start|>]"])


def test_a_list_is_written_as_it_is_typed():
    stated = "tokenizer.add_special_tokens=[<|im_start|>,<|im_end|>, [PAD]]"
    config = load_config(["tokenizer=mistral", "model.vocab_size=32010", stated])
    assert config.tokenizer.add_special_tokens == [*TOKENS, "[PAD]"]


def test_the_vocabulary_of_a_new_model_counts_them():
    from moe.data.tokenizer import count_pieces

    config = load_config(["tokenizer=mistral", "tokenizer.add_special_tokens=[<a>]"], count_pieces=count_pieces)
    assert config.model.vocab_size == 32001
