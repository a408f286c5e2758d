"""A fine-tuning run whose evaluations answer held-out rows: it learns them, at any topology, and keeps the best."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, read_metrics
from tests.faults.forked import moe_ranks

WORDS = ["one", "two", "red", "sea", "dog", "sun"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for rows whose answer is the word in the question."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"prompt": f"{n} say {word}", "completion": word} for n in range(40) for word in WORDS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data=sft", f"data.path={folder / 'rows.jsonl'}", f"data.cache_dir={folder}", "data.held_out=0.1"]
    words += ["tokenizer=sentencepiece", "data.template=plain"]
    return [*words, "train.answer_metrics=[exact_match,json_valid,sql_valid]", "train.answer_tokens=8"]


def _train(run: Path, rows: list[str], *more: str, ranks: int = 1) -> list[dict[str, object]]:
    done = moe_ranks("train", f"run_dir={run}", *SMALL, *rows, *more, ranks=ranks)
    assert [one.code for one in done] == [0] * ranks, done[0].err
    return [line for line in read_metrics(run) if "val_loss" in line]


def test_it_learns_and_the_best_is_kept(rows: list[str], tmp_path: Path) -> None:
    best = ["checkpoint.metric_for_best_model=exact_match", "checkpoint.greater_is_better=true"]
    longer = ["train.steps=200", "train.eval_every=50", "optim.lr=0.01", "train.global_batch_size=8"]
    found = _train(tmp_path / "run", rows, *longer, *best)
    assert [line["exact_match"] for line in found][-1] == 1.0
    assert all(line["json_valid"] == 0 for line in found[1:])
    answers = json.loads((tmp_path / "run/answers.json").read_text())
    assert answers["step"] == 200
    assert all(row["answer"] == row["expected"] and row["expected"] in row["prompt"] for row in answers["rows"])
    first = next(line["step"] for line in found if line["exact_match"] == 1.0)
    assert (tmp_path / "run/checkpoints/best").read_text().strip() == f"step_{first:08d}"
    page = (tmp_path / "run/report.html").read_text()
    assert 'id="h-answers"' in page
    assert "as expected" in page


def test_two_ranks_that_share_experts_or_not(rows: list[str], tmp_path: Path) -> None:
    short = ["train.steps=20", "train.eval_every=10", "train.answer_rows=7", "optim.lr=0.01"]
    alone = _train(tmp_path / "alone", rows, *short)
    shared = _train(tmp_path / "shared", rows, *short, "parallel.expert_parallel_size=2", ranks=2)
    apart = _train(tmp_path / "apart", rows, *short, ranks=2)
    for name in ("exact_match", "json_valid", "sql_valid"):
        expected = [line[name] for line in alone]
        assert [line[name] for line in shared] == [line[name] for line in apart] == expected
    answers = [json.loads((tmp_path / name / "answers.json").read_text()) for name in ("alone", "shared", "apart")]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.loss_on=everything"], "needs rows with prompts (data=sft) and data.loss_on=completion or last_turn"),
        (["train.answer_metrics=[exact]"], "train.answer_metrics"),
        (["train.answer_metrics=[sql_valid,sql_valid]"], "train.answer_metrics=[sql_valid,sql_valid] names one twice"),
        (["train.answer_rows=0"], "train.answer_rows=0 must be > 0"),
    ],
)
def test_mistakes_are_one_line(rows: list[str], tmp_path: Path, words: list[str], message: str) -> None:
    [done] = moe_ranks("train", f"run_dir={tmp_path / 'run'}", *SMALL, *rows, *words)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
