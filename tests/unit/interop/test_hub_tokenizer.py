"""The tokenizer.json that an export writes: SentencePiece's ids for hard texts, transformers' view of it, refusals."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from moe.config import TokenizerConfig, TokenizerKind
from moe.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moe.data.tokenizer import load_saved, open_tokenizer
from moe.errors import UserError
from moe.interop.hub_tokenizer import hub_tokenizer_files, text_ends
from tests.unit.interop.made import mistral_model, small_tokenizer, transformers

HARD = [
    "", " ", "  ", "   a", "a   ", "a  b   c    d" + " " * 40 + "e", "\n\n\t x\r\n", "12345 3.14159 1e-5 007",
    "Grüße 東京 \U0001f600\U0001f469\u200d\U0001f467 \u200b\u00a0\ufeff é e\u0301", "\x00\x01\x7f", "a" * 27, "-" * 33,
    "=" * 64, "<t>", "def f(x):\n    return  x + 1\n", "ŀłŁ ﬁ ﬂ ½ Ⅷ", "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d",
    "hello" * 30, "a\u0300" * 9,
    *(f"a{' ' * count}" for count in range(40)), *(f"{' ' * count}b" for count in range(40)),
]  # fmt: skip


def _random_texts(count: int) -> list[str]:
    draw = random.Random(0)
    alphabets = ["a ", " ", "ab ", "0123456789 .", "=-_ ", "abcdefghij  \n\t", "éüß東京😀 \u00a0a", "the quick "]
    return ["".join(draw.choices(draw.choice(alphabets), k=draw.randrange(1, 60))) for _ in range(count)]


def _tokenizer(name: str) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(mistral_model(), "mistral") if name == "mistral" else small_tokenizer()


def _written(tokenizer: SentencePieceTokenizer, folder: Path) -> Path:
    folder.mkdir()
    for name, content in hub_tokenizer_files(tokenizer, 77).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["mistral", "trained"])
def test_equals_sentencepiece(name: str, tmp_path: Path) -> None:
    own = _tokenizer(name)
    theirs = transformers.AutoTokenizer.from_pretrained(_written(own, tmp_path / "exported"))
    texts = [*HARD, *_random_texts(400)]
    # A literal ▁ is encoded as bytes here, so that it comes back; SentencePiece and a tokenizer.json make it a space.
    for text, ids in zip(texts, own.encode_many(texts), strict=True):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == own.decode(ids), text
    assert theirs("a b")["input_ids"] == [own.bos_id, *own.encode("a b")]
    assert theirs("a", "b")["input_ids"] == [own.bos_id, *own.encode("a"), own.bos_id, *own.encode("b")]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (own.bos_id, own.eos_id, 0)
    assert theirs.model_max_length == 77
    assert len(theirs) == own.vocab_size
    assert theirs.convert_tokens_to_ids(["<s>", "</s>"]) == [own.bos_id, own.eos_id]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "exported" / "tokenizer.json"))
    assert fast("12  34", add_special_tokens=False)["input_ids"] == own.encode("12  34")


def test_comes_back(tmp_path: Path) -> None:
    """What is exported opens here too, with the same ids."""
    own = small_tokenizer()
    folder = _written(own, tmp_path / "exported")
    again = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder)))
    assert again.encode_many(HARD) == own.encode_many(HARD)
    assert (again.bos_id, again.eos_id, again.vocab_size) == (own.bos_id, own.eos_id, own.vocab_size)
    assert [again.decode(ids) for ids in own.encode_many(HARD)] == HARD


def test_chat_template(tmp_path: Path) -> None:
    own = SentencePieceTokenizer(mistral_model(), "mistral")
    own.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    theirs = transformers.AutoTokenizer.from_pretrained(_written(own, tmp_path / "exported"))
    messages = [{"role": "user", "content": "Hi  there"}, {"role": "assistant", "content": "12"}]
    rendered = "<s>[INST] Hi  there [/INST] 12</s>"
    assert theirs.apply_chat_template(messages, tokenize=False) == rendered
    made = theirs.apply_chat_template(messages)
    made = made["input_ids"] if not isinstance(made, list) else made
    assert made == [own.bos_id, *own.encode(rendered[3:-4]), own.eos_id]


def test_a_huggingface_tokenizer_is_kept_as_it_is(tmp_path: Path) -> None:
    folder = _written(small_tokenizer(), tmp_path / "first")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    opened = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder)))
    opened.save(tmp_path / "saved")
    files = hub_tokenizer_files(load_saved(tmp_path / "saved"), 77)
    assert files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    assert files["chat_template.jinja"] == b"{{ messages }}"
    settings = json.loads(files["tokenizer_config.json"])
    assert (settings["bos_token"], settings["eos_token"], settings["unk_token"]) == ("<s>", "</s>", "<unk>")


def _trained(**settings: object) -> SentencePieceTokenizer:
    writer = io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 300, "byte_fallback": True, "normalization_rule_name": "identity"}
    options |= {"remove_extra_whitespaces": False, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text to train on, again and again"] * 20),
        model_writer=writer,
        **options | settings,
    )
    return SentencePieceTokenizer(writer.getvalue(), "trained")


REFUSED: list[tuple[Callable[[], SentencePieceTokenizer], str]] = [
    (lambda: _trained(model_type="unigram"), "it is no BPE model"),
    (lambda: _trained(normalization_rule_name="nmt_nfkc"), "its normalisation (nmt_nfkc) changes the text"),
    (lambda: _trained(remove_extra_whitespaces=True), "its normalisation (identity) changes the text"),
    (lambda: _trained(treat_whitespace_as_suffix=True), "spaces in another way"),
    (lambda: _trained(user_defined_symbols=["<sep>"]), "user-defined pieces and adds a space"),
    (lambda: _trained(bos_id=-1), "it has no BOS piece"),
]


@pytest.mark.parametrize(("make", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_what_a_tokenizer_json_cannot_equal_is_refused(make: Callable[[], SentencePieceTokenizer], text: str) -> None:
    with pytest.raises(UserError, match="can't be written for other programs") as caught:
        hub_tokenizer_files(make(), 10)
    assert text in str(caught.value)


def test_user_defined_pieces(tmp_path: Path) -> None:
    own = _trained(user_defined_symbols=["<sep>", "ing"], add_dummy_prefix=False)
    theirs = transformers.AutoTokenizer.from_pretrained(_written(own, tmp_path / "exported"))
    for text in ("a<sep>b", "again <sep> training", "<sep><sep>  x", "inging ing"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == own.encode(text), text


def test_the_ends_of_a_text() -> None:
    tokenizer = _trained()
    assert text_ends(tokenizer) == [tokenizer.eos_id]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<s>{% endfor %}"
    assert text_ends(tokenizer) == [tokenizer.eos_id, tokenizer.bos_id]
    tokenizer.chat_template = "{{ raise_exception('only with tools') }}"  # whose answers can't be told
    assert text_ends(tokenizer) == [tokenizer.eos_id]
