"""The rows of the chat example: each question once, and its held-out rows are those that training holds out."""

from __future__ import annotations

import json
from pathlib import Path

from data.examples.maths import HELD_OUT, held_out, once, write
from data.examples.splits import asked, read_rows
from moe.config import DataConfig, LossOn, RecordKind, TokenizerConfig
from moe.data.prepare import prepare


def _line(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


LINES = [_line(f"How much is {number} + 1?", f"It is {number + 1}.") for number in range(300)]


def test_a_question_is_there_once_however_it_is_written() -> None:
    again = _line("HOW  much is 3 + 1?", "Another answer.")
    assert once([*LINES, again]) == LINES


def test_the_held_out_rows_are_those_of_training(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{line}\n" for line in LINES))
    kept = held_out(path, HELD_OUT)
    assert 10 < len(kept) < 60
    data = DataConfig(
        path=str(path), records=RecordKind.auto, held_out=HELD_OUT, loss_on=LossOn.everything, cache_dir=str(tmp_path)
    )
    corpus = prepare(data, TokenizerConfig(), sequence_length=64)
    text = corpus.tokenizer.decode(corpus.held_out[0].read(0, corpus.held_out[0].tokens).tolist())
    assert all(row["prompt"] in text for row in kept)
    others = {json.loads(line)["messages"][0]["content"] for line in LINES} - {row["prompt"] for row in kept}
    assert not any(question in text for question in others)


def test_what_is_written(tmp_path: Path) -> None:
    source = tmp_path / "source.jsonl"
    source.write_text("".join(f"{line}\n" for line in [*LINES, LINES[0]]))
    write(source, tmp_path / "folder")
    assert (tmp_path / "folder/rows.jsonl").read_text().splitlines() == LINES
    shown = read_rows(tmp_path / "folder/held_out.jsonl")
    assert [row["prompt"] for row in shown] == (tmp_path / "folder/held_out.txt").read_text().splitlines()
    assert len({asked(row) for row in shown}) == 4
