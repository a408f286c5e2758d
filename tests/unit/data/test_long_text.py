"""A long text encoded in parts has the ids that it has as a whole, and its memory doesn't grow with it."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from moe.config import TokenizerConfig, TokenizerKind
from moe.data import long_text
from moe.data.huggingface_tokenizer import HuggingFaceTokenizer
from moe.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moe.data.stdlib import arithmetic
from moe.data.tokenizer import open_tokenizer
from moe.data.tokenizer_training import train_sentencepiece
from tests.unit.data.test_tokenizer import HARD_TEXTS, huggingface_folder

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
SENTENCES = [text for text, _ in zip(arithmetic(), range(300), strict=False)]
WORDS = [
    "the",
    " quick",
    "  brown",
    "\n",
    "\n\n",
    " fox",
    "▁",
    " ▁x",
    "▁y",
    "é",
    "中文",
    "😀",
    "'s",
    " 12",
    "\t",
    "aa",
    "Å",
    ".",
]


def random_text(seed):
    dice = random.Random(seed)
    return "".join(dice.choice([*WORDS, *HARD_TEXTS, dice.choice(SENTENCES)]) for _ in range(300))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {
        "trained": train_sentencepiece([*SENTENCES, *WORDS], 400, print),
        "mistral": open_tokenizer(TokenizerConfig(kind=TokenizerKind.mistral)),
    }
    for name in ("gpt2", "llama3", "nfc"):
        path = huggingface_folder(folder / name, [*SENTENCES, *WORDS])
        about = json.loads((path / "tokenizer.json").read_text())
        if name == "llama3":
            split = {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": False}
            last = about["pre_tokenizer"] | {"use_regex": False}
            about["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, last]}
        if name == "nfc":
            about["normalizer"] = {"type": "NFC"}
        (path / "tokenizer.json").write_text(json.dumps(about))
        made[name] = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(path)))
    return made


@pytest.mark.parametrize("name", ["trained", "mistral", "gpt2", "llama3", "nfc"])
@pytest.mark.parametrize("part", [1, 2, 7, 50])
def test_parts_have_the_ids_of_the_whole_text(tokenizers, name, part, monkeypatch):
    monkeypatch.setattr(long_text, "PART", part)
    for seed in range(20):
        text = random_text(seed)
        found = list(tokenizers[name].encode_long(text))
        assert [i for ids in found for i in ids] == tokenizers[name].encode(text)
        assert len(found) > 8
    assert list(tokenizers[name].encode_long("")) in ([], [[]])


def test_no_part_is_much_longer_than_it_should_be(tokenizers, monkeypatch):
    monkeypatch.setattr(long_text, "PART", 100)
    text = "".join(SENTENCES)
    for one in tokenizers.values():
        assert len(list(one.encode_long(text))) > len(text) / 200


def test_texts_that_may_not_be_cut_are_encoded_whole(tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(long_text, "PART", 5)
    text = "".join(SENTENCES[:10])
    # What `remove_extra_whitespaces` and NFKC do at one place depends on what is beside it.
    rewrites = tokenizers["trained"]._model + b"\x1a\x02\x20\x01"
    one = SentencePieceTokenizer(rewrites, "rewrites")
    assert list(one.encode_long(text)) == [one.encode(text)]
    about = json.loads(tokenizers["gpt2"]._model)
    about["pre_tokenizer"]["add_prefix_space"] = True
    other = HuggingFaceTokenizer(json.dumps(about).encode(), None, 1, "prefix")
    assert list(other.encode_long(text)) == [other.encode(text)]


MEASURE = """
import json, resource, sys
from pathlib import Path
from moe.config import DataConfig, TokenizerConfig, TokenizerKind
from moe.data.prepare import prepare

folder, kind, path = Path(sys.argv[1]), TokenizerKind(sys.argv[2]), sys.argv[3] or None
tokenizer = TokenizerConfig(kind=kind, path=path, vocab_size=400 if kind is TokenizerKind.sentencepiece else None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prepare(DataConfig(path=str(folder / "rows.jsonl"), cache_dir=str(folder / "cache")), tokenizer)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", [pytest.param("mistral", marks=pytest.mark.slow), "sentencepiece", "huggingface"])
def test_a_row_of_20_mb_takes_less_than_ten_times_its_size(tmp_path, kind):
    line = "the quick brown fox jumps over the lazy dog "  # one line, which was too long to train on
    row = json.dumps({"text": line * (20_000_000 // len(line))}) + "\n"
    rows = "".join(json.dumps({"text": text}) + "\n" for text in SENTENCES)
    (tmp_path / "rows.jsonl").write_text(row + rows)
    path = str(huggingface_folder(tmp_path / "hf", [*SENTENCES, line])) if kind == "huggingface" else ""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), kind, path],
        capture_output=True, text=True, timeout=200, check=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert int(done.stdout.split()[-1]) < 10 * len(row)
