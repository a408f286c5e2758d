"""Tokenizers: exact round trips, bytes per id, saving and loading, and the messages for unusable ones."""

import hashlib
import json
import pickle
import random

import numpy as np
import pytest
import sentencepiece

from moe.config import LongRows, LossOn, TokenizerConfig, TokenizerKind
from moe.data.added_tokens import with_special_tokens
from moe.data.chat_template import ChatTemplate
from moe.data.chat_templates import PLAIN
from moe.data.readers import DataError
from moe.data.record_encoding import Recipe
from moe.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moe.data.stdlib import arithmetic
from moe.data.tokenizer import load_saved, open_tokenizer
from moe.data.tokenizer_training import LONG_LINE, sample_blocks, train_sentencepiece
from moe.interop.hub_tokenizer import hub_tokenizer_files

HARD_TEXTS = [
    "def f(x):\n\tif x  ==   1:\r\n        return 'é中😀'\n\n\n",
    "   leading and trailing   ",
    " ",
    "\n",
    "▁ a literal ▁▁ sign ▁",
    "</s><s><unk><0x0A>",
    "\x00\x07\ufeff\u2028\u3000\xa0\t\t",
    "e\u0301 is not é; ﬁ is not fi; Å is not Å",
]


@pytest.fixture(scope="module")
def texts():
    return [text for text, _ in zip(arithmetic(), range(300), strict=False)]


@pytest.fixture(scope="module")
def trained(texts):
    return train_sentencepiece([*texts, "def f(x):\n\treturn x\n"], 400, print)


@pytest.fixture(scope="module")
def mistral():
    return open_tokenizer(TokenizerConfig(kind=TokenizerKind.mistral))


def huggingface_folder(folder, texts, *, byte_level=True):
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=not byte_level))
    specials = ["<s>", "</s>"]
    if byte_level:
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        specials += [f"<0x{byte:02X}>" for byte in range(256)]
        backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        backend.decoder = tokenizers.decoders.Sequence(
            [
                tokenizers.decoders.Replace("▁", " "),
                tokenizers.decoders.ByteFallback(),
                tokenizers.decoders.Fuse(),
            ]
        )
        alphabet = []
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    folder.mkdir()
    saved = json.loads(backend.to_str())
    if not byte_level:  # byte pieces aren't special tokens, as in Llama's file
        saved["added_tokens"] = [token for token in saved["added_tokens"] if not token["content"].startswith("<0x")]
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"})
    )
    return folder


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_trained_round_trip_is_exact(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(trained.eos_id != i != trained.bos_id for i in ids)


def test_trained_round_trip_of_random_unicode(trained):
    generator = random.Random(0)
    for _ in range(200):
        length = generator.randrange(40)
        codes = (generator.choice([generator.randrange(0xD800), generator.randrange(128)]) for _ in range(length))
        text = "".join(map(chr, codes))
        assert trained.decode(trained.encode(text)) == text


def test_many_texts_at_once_equal_one_by_one(trained):
    assert trained.encode_many(HARD_TEXTS) == [trained.encode(text) for text in HARD_TEXTS]
    plain = [text for text in HARD_TEXTS if "▁" not in text]
    assert trained.encode_many(plain) == [trained.encode(text) for text in plain]


def test_token_bytes_add_up_to_the_text(trained, mistral):
    for text in HARD_TEXTS:
        size = len(text.encode())
        assert trained.token_bytes()[trained.encode(text)].sum() == size
        if not text.startswith("▁"):
            assert mistral.token_bytes()[mistral.encode(text)].sum() in (
                size,
                size + 1,
            )  # + 1: the space that it puts before the text
    assert trained.token_bytes()[[0, trained.bos_id, trained.eos_id]].tolist() == [0, 0, 0]
    assert trained.token_bytes().dtype == np.int64


def test_pieces_are_readable(trained):
    text = "12 + 30 = 42\n"
    assert "".join(trained.piece(i) for i in trained.encode(text)) == text
    assert trained.piece(trained.encode("é")[0]) == "<0xC3>"
    assert trained.piece(trained.bos_id) == "<s>"


def test_training_is_deterministic_and_smaller_when_the_text_is(texts):
    first, second = (train_sentencepiece(texts, 350, print) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 350
    logged = []
    small = train_sentencepiece(["a b a b a b a b c\n"] * 5, 2048, logged.append)
    assert small.vocab_size < 2048
    assert logged == [f"tokenizer: the text is enough for {small.vocab_size} pieces, not tokenizer.vocab_size=2048"]
    assert small.decode(small.encode("zzz")) == "zzz"


def test_thousands_of_characters_fit_a_small_vocabulary():
    text = "".join(chr(0x4E00 + i * 7919 % 20000) for i in range(20000))
    tokenizer = train_sentencepiece([text], 300, print)
    assert tokenizer.decode(tokenizer.encode(text[:500])) == text[:500]


def test_digits_are_split(trained):
    assert len([i for i in trained.encode("123456") if trained.piece(i).strip()]) == 6


def test_training_on_no_text_raises():
    with pytest.raises(DataError, match="holds no text to train on"):
        train_sentencepiece(["\n\n"], 300, print)


def test_sample_is_even_over_the_corpus():
    texts = [f"{i:04d} {'x' * 250}\n" * 4 for i in range(1000)]
    taken = list(sample_blocks(iter(texts), 0.25))
    size = sum(map(len, taken))
    assert abs(size / sum(map(len, texts)) - 0.25) < 0.01
    places = [int(block[:4]) for block in taken]
    assert min(places) < 20
    assert max(places) > 980
    assert list(sample_blocks(iter(texts), 1.0)) == texts


def test_a_sample_of_one_long_line_is_even_and_in_small_blocks():
    line = "".join(f"{i:07d} " for i in range(LONG_LINE))
    taken = list(sample_blocks(iter([line]), 0.1))
    assert max(map(len, taken)) <= 4096
    assert abs(sum(map(len, taken)) / len(line) - 0.1) < 0.01
    assert int(taken[-1][:7]) > 0.95 * LONG_LINE


def test_blocks_end_where_lines_do():
    dice = random.Random(0)
    for _ in range(20):
        text = "".join(dice.choice(["\n", "\r", "\r\n", "\x0b", "\u2028", "word " * 30, "x"]) for _ in range(3000))
        blocks, size = [[]], 0
        for line in text.splitlines(keepends=True):
            blocks[-1].append(line)
            size += len(line)
            if size >= 4096:
                blocks.append([])
                size = 0
        assert list(sample_blocks(iter([text]), 1.0)) == ["".join(block) for block in blocks if block]


def test_save_and_load(trained, texts, tmp_path):
    folder = huggingface_folder(tmp_path / "hf", texts)
    reread = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder)))
    for name, tokenizer in (("trained", trained), ("hf", reread)):
        tokenizer.save(tmp_path / "saved" / name)
        loaded = load_saved(tmp_path / "saved" / name)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.vocab_size, loaded.bos_id, loaded.eos_id) == (
            tokenizer.vocab_size,
            tokenizer.bos_id,
            tokenizer.eos_id,
        )
        assert loaded.encode("1 + 1 = 2\n") == tokenizer.encode("1 + 1 = 2\n")


def test_a_tokenizer_without_bos_is_saved_and_read_again(texts, tmp_path):
    folder = huggingface_folder(tmp_path / "hf", texts)
    config = TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder))
    model = (folder / "tokenizer.json").read_bytes()
    assert open_tokenizer(config).fingerprint == hashlib.sha256(model + b"|0|1").hexdigest()
    (folder / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "</s>"}')
    tokenizer = open_tokenizer(config)
    tokenizer.save(tmp_path / "saved")
    loaded = load_saved(tmp_path / "saved")
    assert (loaded.bos_id, loaded.eos_id, loaded.fingerprint) == (1, 1, tokenizer.fingerprint)


@pytest.mark.parametrize(("bos", "rendered"), [("</s>", "</s>how</s>"), (None, "how</s>")])
def test_a_bos_that_is_the_eos_is_told_from_none(texts, tmp_path, bos, rendered):
    folder = huggingface_folder(tmp_path / "hf", texts)
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
    names = {"bos_token": bos, "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    opened = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder)))
    opened.save(tmp_path / "saved")
    exported = hub_tokenizer_files(opened, 77)
    assert json.loads(exported["tokenizer_config.json"]).get("bos_token") == bos
    (tmp_path / "exported").mkdir()
    for name, content in exported.items():
        (tmp_path / "exported" / name).write_bytes(content)
    path = str(tmp_path / "exported")
    for one in (
        opened,
        pickle.loads(pickle.dumps(opened)),
        load_saved(tmp_path / "saved"),
        open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=path)),
        with_special_tokens(opened, ["<x>"]),
    ):
        assert (one.bos_id, one.eos_id, one.has_bos, one.chat_template) == (1, 1, bos is not None, template)
        segments = ChatTemplate(template, one, "it").prompt([{"role": "user", "content": "how"}])
        assert "".join(segment.text for segment in segments) == rendered
    opened.chat_template = PLAIN  # begins with EOS where there is no BOS
    assert json.loads(hub_tokenizer_files(opened, 77)["tokenizer_config.json"])["bos_token"] == "</s>"

    card = tmp_path / "saved/moe_tokenizer.json"
    stated = json.loads(card.read_text())
    card.write_text(json.dumps({key: value for key, value in stated.items() if key != "has_bos"}))
    assert not load_saved(tmp_path / "saved").has_bos  # as of earlier releases
    card.write_text(json.dumps(stated | {"has_bos": 1}))
    with pytest.raises(DataError, match="has_bos=1 must be true or false"):
        load_saved(tmp_path / "saved")


def test_rows_with_a_bos_that_is_the_eos_are_others_than_without(texts, tmp_path):
    folder = huggingface_folder(tmp_path / "hf", texts)
    identities = []
    for bos in ("</s>", None, "<s>"):
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": "</s>"}))
        tokenizer = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder)))
        template = ChatTemplate(PLAIN, tokenizer, "it")
        recipe = Recipe(template, tokenizer, LossOn.completion, LongRows.truncate, 64)
        identities.append([tokenizer.fingerprint, *recipe.identity])
    assert [identities.count(one) for one in identities] == [1, 1, 1]
    assert len(identities[0]) == len(identities[1]) + 1 == len(identities[2]) + 1


def test_saved_tokenizer_with_other_content_is_refused(trained, tmp_path):
    trained.save(tmp_path)
    other = train_sentencepiece(["entirely other text, again and again\n"] * 9, 300, lambda line: None)
    other.save(tmp_path / "other")
    (tmp_path / "tokenizer.model").write_bytes((tmp_path / "other" / "tokenizer.model").read_bytes())
    with pytest.raises(DataError, match="its content is not what was saved"):
        load_saved(tmp_path)
    with pytest.raises(DataError, match="holds no saved tokenizer"):
        load_saved(tmp_path / "nowhere")


def test_mistral_has_the_published_ids(mistral):
    assert (mistral.vocab_size, mistral.bos_id, mistral.eos_id) == (32000, 1, 2)
    for text in HARD_TEXTS[:4]:
        assert mistral.decode(mistral.encode(text)) == text


def test_model_file(trained, tmp_path):
    trained.save(tmp_path)
    path = tmp_path / "tokenizer.model"
    opened = open_tokenizer(TokenizerConfig(kind=TokenizerKind.model_file, path=str(path)))
    assert opened.fingerprint == trained.fingerprint


@pytest.mark.parametrize("byte_level", [True, False])
def test_huggingface_folder(tmp_path, texts, byte_level):
    folder = huggingface_folder(tmp_path / "hf", texts, byte_level=byte_level)
    tokenizer = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder)))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    sizes = tokenizer.token_bytes()
    for text in (*HARD_TEXTS[:4], HARD_TEXTS[6], HARD_TEXTS[7], "an injected </s> stays text"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())
        assert tokenizer.eos_id not in ids
    assert tokenizer.encode_many(["1 + 1", "2"]) == [tokenizer.encode("1 + 1"), tokenizer.encode("2")]
    assert sizes[[0, 1]].tolist() == [0, 0]
    assert "".join(tokenizer.piece(i) for i in tokenizer.encode("12 + 30\n")) == "12 + 30\n"


def test_huggingface_equals_transformers(tmp_path, texts):
    transformers = pytest.importorskip("transformers")
    folder = huggingface_folder(tmp_path / "hf", texts)
    ours = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder)))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    text = "".join(texts[:5])
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_broken_tokenizers_are_one_line(tmp_path, texts):
    def error_of(kind, path):
        with pytest.raises(DataError) as caught:
            open_tokenizer(TokenizerConfig(kind=kind, path=str(path)))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    model, huggingface = TokenizerKind.model_file, TokenizerKind.huggingface
    (tmp_path / "not.model").write_bytes(b"plain text")
    assert "not a SentencePiece model" in error_of(model, tmp_path / "not.model")
    assert "No such file" in error_of(model, tmp_path / "missing.model")
    assert "must be a local folder" in error_of(huggingface, "mistralai/Mixtral-8x7B-v0.1")
    (tmp_path / "empty").mkdir()
    assert "neither tokenizer.json nor tokenizer.model" in error_of(huggingface, tmp_path / "empty")
    folder = huggingface_folder(tmp_path / "hf", texts)
    assert "use tokenizer=huggingface" in error_of(model, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text("{}")
    assert "has no end-of-sequence token" in error_of(huggingface, folder)
    (folder / "tokenizer_config.json").write_text("{")
    assert "broken JSON" in error_of(huggingface, folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").unlink()
    assert "not a tokenizer.json" in error_of(huggingface, folder)


def test_model_without_byte_pieces_is_refused(tmp_path, texts):
    prefix = tmp_path / "plain"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(prefix), vocab_size=200, model_type="bpe", minloglevel=2
    )
    with pytest.raises(DataError, match="has no byte pieces"):
        SentencePieceTokenizer(prefix.with_suffix(".model").read_bytes(), "plain.model")


def test_a_chat_template_is_saved_beside_the_tokenizer_and_is_not_part_of_its_fingerprint(trained, tmp_path):
    template, before = "{{ messages[0]['content'] }}", trained.fingerprint
    trained.chat_template = template
    try:
        trained.save(tmp_path)
    finally:
        trained.chat_template = None
    loaded = load_saved(tmp_path)
    assert (loaded.chat_template, loaded.fingerprint) == (template, before)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"chat_template\.jinja: unreadable"):
        load_saved(tmp_path)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("{{ a }}", "{{ a }}"),
        ([{"name": "tool", "template": "x"}, {"name": "default", "template": "y"}], "y"),
        ("", None),
    ],
)
def test_the_chat_template_of_a_huggingface_folder(tmp_path, texts, stated, expected):
    folder = huggingface_folder(tmp_path / "tokenizer", texts)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": stated}))
    assert open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder))).chat_template == expected
