"""`moe bench time_to_loss`: a GPT that trains the same on one rank and two; the benchmark at a small shape."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from moe.bench import gpt, run_bench, time_to_loss
from moe.config.compose import load_config
from tests.ranks import run_ranks

SMALL = [
    "data=files", "tokenizer.vocab_size=300", "model.vocab_size=320", "model.hidden_size=32",
    "model.num_attention_heads=4", "model.num_key_value_heads=2", "model.intermediate_size=48",
    "model.num_hidden_layers=2", "train.sequence_length=32", "train.micro_batch_size=2", "train.global_batch_size=8",
    "train.eval_sequences=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpus")
    words = random.Random(0).choices(["the", "cat", "sat", "on", "a", "mat", "and", "saw", "nine", "dogs"], k=20_000)
    (folder / "book.txt").write_text("\n\n".join(" ".join(words[i : i + 50]) for i in range(0, len(words), 50)))
    return [f"data.path={folder / 'book.txt'}", f"data.cache_dir={folder / 'cache'}"]


def _train(overrides: list[str], folder: str) -> list[dict[str, Any]]:
    gpt.train(load_config([*overrides, f"run_dir={folder}"]))
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_the_gpt_trains_the_same_on_one_rank_and_two(corpus: list[str], tmp_path: Path) -> None:
    keys = [*SMALL, *corpus, "train.steps=6", "train.eval_every=3"]
    one = run_ranks(1, _train, keys, str(tmp_path / "one"))[0]
    two = run_ranks(2, _train, keys, str(tmp_path / "two"))[0]
    assert [row["step"] for row in two] == [1, 2, 3, 4, 5, 6]
    assert ["val_loss" in row for row in two] == [False, False, True] * 2
    for name in ("lm_loss", "val_loss"):
        ours, theirs = ([row[name] for row in rows if name in row] for rows in (one, two))
        assert ours == pytest.approx(theirs, abs=2e-5)
        assert ours[-1] < ours[0]


@pytest.mark.slow
@pytest.mark.timeout(660)
def test_all_sides_get_the_seconds_of_the_quickstart(
    corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plot.svg"
    run_bench(["time_to_loss", "rounds=1", "train.steps=12", f"plot={plot}", *SMALL, *corpus])
    lines = capsys.readouterr().out.splitlines()
    sides = ["quickstart", *(f"quickstart, {kind}" for kind in ("Muon", "dense", "bfloat16"))]
    sides.append("GPT-2 of transformers, 2 layers")
    assert [line.split(":")[0] for line in lines[:5]] == [f"seed 0, {side}" for side in sides]
    figures = [line.removeprefix("validation loss, ").rpartition(" ") for line in lines[-5:]]
    assert [name for name, _, _ in figures] == [f"{side}:" for side in reversed(sides)]
    assert all(0 < float(loss) < 6 for _, _, loss in figures)
    head = lines.index("validation loss, nats, against seconds of training:") + 1
    last = lines[head + time_to_loss.PARTS].split()
    figure_losses = [float(loss) for _, _, loss in reversed(figures)]
    assert [float(loss) for loss in last[1:]] == pytest.approx(figure_losses, abs=0.006)  # both are rounded
    drawn = plot.read_text()
    assert all(f"{side}: " in drawn for side in sides)
