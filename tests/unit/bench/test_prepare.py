"""`moe bench prepare` on a small corpus: its keys, its table and its last lines."""

import re

import pytest

from moe.bench import prepare, run_bench
from moe.errors import UserError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=0", "rounds=0 must be ≥ 1"),
        ("processes=1", "processes=1 must be ≥ 2"),
        ("megabytes=much", "megabytes=much must be a whole number ≥ 1"),
    ],
)
def test_bad_keys(override, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run_bench(["prepare", override])


def test_every_corpus_is_measured(monkeypatch, capsys):
    written = prepare.write_corpora
    monkeypatch.setattr(prepare, "write_corpora", lambda folder, size: written(folder, 300_000))
    run_bench(["prepare", "rounds=1", "processes=2", "data.held_out=0.1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["text", "jsonl", "sft"]
    sizes = [float(line.split()[1]) for line in lines[1:4]]
    assert sizes[0] == sizes[1] >= 0.3 >= sizes[2] > 0
    assert re.fullmatch(r"MB/s a core \d+\.\d\d", lines[-2])
    assert re.fullmatch(r"2 processes ÷ 1: \d+\.\d\d", lines[-1])
