"""`moe validate`: every bad row with its place and reason, the corrected copy, the numbers, samples, and the page."""

import csv
import json
import random
import re
import time
from datetime import datetime
from decimal import Decimal

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from rich.console import Console

from moe.cli.verbs import load
from moe.data.prepare import prepare
from moe.errors import UserError
from moe.validate.facts import estimates
from moe.validate.page import page
from moe.validate.run import run_validate, validate
from tests.unit.data.test_huggingface_tokenizer import closed_folder

GOOD = [{"prompt": f"what is {i} + {i}?", "completion": f"it is {2 * i}"} for i in range(200)]
GOOD_CHAT = {"messages": [{"role": "user", "content": "how"}, {"role": "assistant", "content": "so"}]}
BAD = {
    3: ('{"prompt": "a"', "broken JSON at column 15"),
    5: ('{"prompt": "a", "completion": ""}', "completion is empty"),
    8: (
        '{"question": "a", "sql": "b"}',
        "no column 'prompt', which a row of kind prompt_completion has; it has question",
    ),
    9: ('{"prompt": 3, "completion": "b"}', "prompt must be text, is a number"),
    12: ('{"messages": [{"role": "user", "content": "x"}]}', "no column 'prompt'"),
}


def config(path, *overrides):
    given = ["data=sft", f"data.path={path}", "train.sequence_length=64", *overrides]
    return load(given, "validate")


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def mixed(tmp_path):
    """A file whose lines of BAD are bad."""
    lines = [json.dumps(row) for row in GOOD]
    for number, (line, _) in sorted(BAD.items()):
        lines.insert(number - 1, line)
    return write(tmp_path / "rows.jsonl", lines)


def output(config):
    console = Console(width=200, record=True, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    error = ""
    try:
        run_validate(config, console)
    except UserError as raised:
        error = str(raised)
    return console.export_text(), error


def test_every_bad_row_is_told_and_the_copy_has_the_others(mixed, tmp_path):
    fixed = tmp_path / "fixed.jsonl"
    text, error = output(config(mixed, f"fixed={fixed}"))
    for number, (_, rule) in BAD.items():
        assert re.search(rf"rows\.jsonl:{number}: {re.escape(rule)}", text), text
    assert error == f"5 of 205 rows are bad: {fixed} has the others"
    assert [json.loads(line) for line in fixed.read_text().splitlines()] == GOOD
    text, error = output(config(fixed))
    assert not error
    assert "rows        200 of kind prompt_completion" in text
    with pytest.raises(UserError, match=r"fixed=.*: exists already"):
        run_validate(config(mixed, f"fixed={fixed}"))


def test_a_copy_has_values_that_json_has_not_as_text(tmp_path):
    row = GOOD[0] | {"at": datetime(2024, 1, 2), "raw": b"\xff", "price": Decimal("1.50")}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    text = {"at": "2024-01-02 00:00:00", "raw": "b'\\xff'", "price": "1.50"}
    lone = GOOD[0] | {"other": "\ud800 é"}
    write(tmp_path / "lone.jsonl", [json.dumps(lone)])
    for name, expected in (("rows.parquet", GOOD[0] | text), ("lone.jsonl", lone)):
        fixed = tmp_path / f"fixed-{name}.jsonl"
        assert validate(config(tmp_path / name, f"fixed={fixed}")).rows == 1
        assert json.loads(fixed.read_text()) == expected


def test_the_numbers_are_those_of_the_shards(tmp_path):
    dice = random.Random(0)
    rows = [
        {"prompt": "word " * dice.randrange(1, 60), "completion": f"{i} " * dice.randrange(1, 9)} for i in range(300)
    ]
    path = write(tmp_path / "rows.jsonl", map(json.dumps, rows + rows[:7]))
    given = config(path, f"data.cache_dir={tmp_path}/cache")
    [found] = validate(given).findings
    corpus = prepare(given.data, given.tokenizer, sequence_length=64, log=lambda line: None)
    assert found.sequences == {
        "train": corpus.train[0].tokens // 64, "held_out": corpus.held_out[0].tokens // 64,
    }  # fmt: skip
    assert found.duplicates()[0] == 7
    assert found.duplicates()[1][0] == f"{path}:301"
    assert found.long["truncate"] == sum(length > 64 for length in found.lengths)
    assert len(found.lengths) == 307
    assert np.percentile(found.lengths, 100) == max(found.lengths)


def test_the_run_is_the_stated_one(tmp_path):
    path = write(tmp_path / "rows.jsonl", map(json.dumps, GOOD))
    for override, run in (("train.steps=30", "30 steps, "), ("train.epochs=3", "steps, 3.")):
        validation = validate(config(path, override, "train.global_batch_size=5", "train.micro_batch_size=1"))
        lines = dict(estimates(validation))
        sequences = validation.findings[0].sequences["train"]
        assert run in lines["run"]
        assert lines["steps"].startswith(f"{-(-sequences // 5)} an epoch")


def test_a_file_whose_end_cant_be_read_and_one_of_rows(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["prompt", "completion"], *([row["prompt"], row["completion"]] for row in GOOD)])
        file.write('"open,b\nx,y\n')
    text, error = output(config(path))
    assert (
        "rows.csv:202: a quote that opens a field in this row is never closed (the rest of the file isn't read)" in text
    )
    assert error.startswith("1 of 201 rows are bad")


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("", "is empty: it holds no row"),
        ("\n\n", "is empty: it holds no row"),
        ('{"question": "a", "answer": "b"}\n', "1 of 1 rows are bad"),
    ],
)
def test_files_without_a_good_row(tmp_path, content, rule):
    (tmp_path / "rows.jsonl").write_text(content)
    _, error = output(config(tmp_path / "rows.jsonl"))
    assert rule in error


def test_a_file_of_one_distinct_row_is_refused_as_by_a_run(tmp_path):
    path = write(tmp_path / "rows.jsonl", [json.dumps(GOOD[0])] * 3)
    text, error = output(config(path))
    assert "rows        3 of kind prompt_completion" in text
    assert error == (
        f"source 'text' (jsonl:{path}) holds one distinct row: training and held-out rows need at least one each; "
        "give more rows"
    )
    given = config(path, f"data.cache_dir={tmp_path}/cache")
    with pytest.raises(UserError, match="holds one distinct document"):
        prepare(given.data, given.tokenizer, sequence_length=64, log=lambda line: None)
    path.write_text(path.read_text() + json.dumps(GOOD[1]) + "\n")
    assert not output(config(path))[1]


def test_a_row_outside_a_closed_vocabulary_is_one_bad_row(tmp_path):
    lines = [json.dumps({"text": text}) for text in ("12", "345", "1+1", "6")]
    path = write(tmp_path / "rows.jsonl", lines)
    tokenizer = closed_folder(tmp_path / "digits")
    given = ["data.template=plain", "tokenizer=huggingface", f"tokenizer.path={tokenizer.path}"]
    fixed = tmp_path / "fixed.jsonl"
    rule = f"{path}:3: 1+1: has characters that are in none of the tokenizer's pieces"
    text, error = output(config(path, *given, f"fixed={fixed}"))
    assert rule in text
    assert error.startswith("1 of 4 rows are bad")
    assert fixed.read_text().splitlines() == [*lines[:2], lines[3]]
    wanted = config(path, *given, f"data.cache_dir={tmp_path}/cache")
    with pytest.raises(UserError) as caught:
        prepare(wanted.data, wanted.tokenizer, sequence_length=64, log=lambda line: None)
    assert str(caught.value) == rule


def test_samples_show_what_is_learnt(tmp_path):
    messages = [{"role": "user", "content": "a <b> & </s>"}, {"role": "assistant", "content": "été\t\x07"}]
    path = write(tmp_path / "rows.jsonl", [json.dumps({"messages": messages}), json.dumps(GOOD_CHAT)])
    validation = validate(config(path))
    html = page(validation)
    learnt = "".join(re.findall(r'<span class="learnt">(.*?)</span>', html))
    assert learnt.startswith("learnt") or "été" in learnt  # the legend is first
    assert '<span class="learnt special">&lt;/s&gt;</span>' in html
    assert "a <b>" not in html
    assert "a&lt;b&gt;" not in learnt
    console = Console(width=200, record=True, file=open("/dev/null", "w"), no_color=True, force_terminal=False)  # noqa: SIM115
    run_validate(config(path), console)
    assert "[/INST][[ été\\t\\x07</s>]]" in console.export_text()


def test_a_trained_tokenizer_and_a_page(mixed, tmp_path):
    target = tmp_path / "rows.html"
    given = config(mixed, "tokenizer=sentencepiece", "tokenizer.vocab_size=320", f"page={target}", "problems=1")
    text, error = output(given)
    assert error.startswith("5 of 205")
    assert "and 4 more" in text
    assert "<script" not in (html := target.read_text())
    assert all(f"rows.jsonl:{number}: " in html for number in BAD)


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("fixed=a.csv", "fixed=a.csv must end with .jsonl"),
        ("page=a.txt", "page=a.txt must end with .html"),
        ("data.records=documents", "add data=sft"),
        ("samples=-1", "samples=-1 must be ≥ 0"),
    ],
)
def test_keys_that_cant_be(mixed, override, rule):
    with pytest.raises(UserError, match=rule):
        config(mixed, override)


def test_a_hundred_thousand_short_rows_take_seconds(tmp_path):
    """A tenth of them in a tenth of 20 s on 2 cores, by this process's CPU time."""
    dice = random.Random(0)
    words = [
        "the",
        "of",
        "and",
        "to",
        "in",
        "is",
        "that",
        "it",
        "was",
        "for",
        "on",
        "are",
        "as",
        "with",
        "his",
        "they",
        "at",
        "be",
        "this",
        "from",
        "have",
        "or",
        "by",
        "one",
    ]
    rows = [
        {"messages": [{"role": "user", "content": " ".join(dice.choices(words, k=12))},
                      {"role": "assistant", "content": " ".join(dice.choices(words, k=15))}]}
        for _ in range(10_000)
    ]  # fmt: skip
    given = config(write(tmp_path / "rows.jsonl", map(json.dumps, rows)))
    started = time.process_time()
    assert validate(given).rows == 10_000
    assert time.process_time() - started < 4
