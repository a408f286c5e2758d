"""The generators: right answers, every distinct row once, and no leak in what is written."""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import ModuleType

import pytest

from data.examples import arithmetic, expressions, numbers
from data.examples.page import script_of
from data.examples.splits import asked, leaks, read_rows
from moe.config import TokenizerConfig, TokenizerKind
from moe.data.readers import DataError
from moe.data.tokenizer import open_tokenizer
from moe.data.tokenizer_base import Tokenizer
from moe.interop.hub_tokenizer import hub_tokenizer_files
from tests.unit.interop.made import transformers


def tokenizer(folder: Path) -> Tokenizer:
    return open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder / "tokenizer")))


def test_numbers(tmp_path: Path) -> None:
    numbers.write(tmp_path)
    train, held_out = (read_rows(tmp_path / f"{name}.jsonl") for name in ("train", "held_out"))
    assert len(train) == 1_000
    assert not leaks(train, held_out)
    for row in train + held_out + numbers.starts():
        counted = [int(number) for number in (row["prompt"] + row["completion"]).split(" ")]
        assert counted == [*range(counted[0], 51)]
    assert [int(row["prompt"].split()[0]) for row in numbers.starts()] == [*range(1, 48)]
    tokens = tokenizer(tmp_path)
    assert tokens.vocab_size == 51
    assert tokens.encode("1 2 50") == [1, 2, 50]
    assert tokens.decode([49, 50]) == "49 50"
    with pytest.raises(DataError, match=r"^50 51: has characters that are in none of the tokenizer's pieces$"):
        tokens.encode("50 51")


def test_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "EPOCH", 500)
    arithmetic.write(tmp_path)
    train, direct, seen, held_out, larger = (
        read_rows(tmp_path / f"{name}.jsonl") for name in ("worked", "direct", "seen", "held_out", "larger")
    )
    assert len(train) == len(direct) == 20 * 500
    assert {asked(row) for row in direct} == {asked(row) for row in seen}
    assert sum(arithmetic.is_small(row) for row in train) == len(train) / 4
    for rows in (train, direct, seen):
        assert not leaks(rows, held_out + larger, arithmetic.pair)
    assert len(seen) + len(held_out) == len({asked(row) for row in seen + held_out}) == 1_200
    tokens = tokenizer(tmp_path)
    for row in seen + held_out + larger:
        value = eval(row["prompt"].removesuffix("="))
        assert (str(value), arithmetic.answer(row["completion"])) == (row["answer"], row["answer"])
        assert {eval(side) for side in row["completion"].split("=")} == {value}
        assert tokens.decode(tokens.encode(row["prompt"] + row["completion"])) == row["prompt"] + row["completion"]


def test_both_orders_of_a_pair_are_on_one_side() -> None:
    assert arithmetic.pair({"prompt": "13*7="}) == arithmetic.pair({"prompt": "7*13="}) == "7*13"


def test_expressions_and_their_working() -> None:
    generator = random.Random(3)
    rows = [expressions.expression(generator) for _ in range(2_000)]
    for row in rows:
        assert eval(row["prompt"].removesuffix("=")) == int(row["answer"])
        assert expressions.answer(row["completion"]) == row["answer"]
        for step in row["completion"].split(";"):
            assert len({eval(side) for side in step.split("=")}) == 1, step
    assert {row["prompt"].count("(") for row in rows} == {1}
    assert {re.sub(r"\d+", "", row["prompt"]) for row in rows} == {
        shape.format(first, second) for shape in ("({}){}=", "{}({})=") for first in "+-*" for second in "+-*"
    }


def test_the_page_states_the_scripts_epochs() -> None:
    assert f"train.epochs={expressions.EPOCHS} " in script_of("expressions").read_text(encoding="utf-8")


def test_expressions_are_distinct_and_of_one_side() -> None:
    train, held_out = (expressions.draw(500, 0, held_out=side) for side in (False, True))
    assert len({row["prompt"] for row in train}) == len({row["prompt"] for row in held_out}) == 500
    assert not leaks(train, held_out)


@pytest.mark.parametrize(
    ("cut", "text"),
    [
        ((12, "*", 34, 34), "12*34=48+360=408"),
        ((-37, "*", 35, 35), "-37*35=-185-1110=-1295"),
        ((30, "*", 12, 30), "30*12=0+360=360"),
        ((30, "*", 7, 7), "30*7=210"),
        ((3, "-", 40, 40), "3-40=-37"),
    ],
)
def test_working(cut: tuple[int, str, int, int], text: str) -> None:
    assert expressions.worked(*cut)[1] == text


@pytest.mark.parametrize(
    ("module", "text"), [(numbers, "1 2 3 50"), (expressions, "(12*34)-5=12*34=48+360=408;408-5=403")]
)
def test_transformers_reads_an_exported_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, text: str
) -> None:
    """The same ids, and no token more: a closed vocabulary has no unknown token."""
    monkeypatch.setattr(expressions, "EPOCH", 10)  # rows are not what this is about
    module.write(tmp_path)
    own = tokenizer(tmp_path)
    (tmp_path / "exported").mkdir()
    for name, content in hub_tokenizer_files(own, 64).items():
        (tmp_path / "exported" / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert len(theirs) == own.vocab_size
    assert theirs(text, add_special_tokens=False)["input_ids"] == own.encode(text)
    assert theirs.decode(own.encode(text)) == text
