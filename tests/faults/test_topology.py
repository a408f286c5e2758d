"""A run resumes at another number of ranks or expert-parallel size: same samples, same losses."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from moe.cli import main as cli
from moe.data.loader import Batch, Loader
from tests.e2e.conftest import SMALL, read_metrics
from tests.ranks import run_ranks

STEPS, RESUMED = 8, 4
TOPOLOGIES = {  # name → ranks, expert-parallel size, ZeRO stage
    "1 rank": (1, 1, 1),
    "2 ranks": (2, 1, 2),
    "2 ranks, EP 2": (2, 2, 1),
    "4 ranks, EP 4": (4, 4, 1),
    "4 ranks, EP 2": (4, 2, 2),
}
OVERRIDES = [
    *SMALL, "train.global_batch_size=8", f"train.steps={STEPS}", f"checkpoint.every={RESUMED}", "optim.warmup_steps=1",
    "train.eval_every=8",
]  # fmt: skip


def _train(overrides: list[str]) -> list[list[int]]:
    """Runs `moe train` on this rank; returns the sample ids of each of its steps."""
    sample_ids: list[list[int]] = []
    next_step = Loader.next_step

    def recording(self: Loader) -> list[Batch]:
        batches = next_step(self)
        sample_ids.append([int(sample) for batch in batches for sample in batch.sample_ids_B])
        return batches

    Loader.next_step = recording  # type: ignore[method-assign]
    sys.argv = ["moe", "train", *overrides]
    cli.main()
    return sample_ids


def _run(folder: Path, corpus: list[str], name: str) -> list[list[int]]:
    """Trains to the end; returns the sorted sample ids of each step over all ranks."""
    ranks, expert_parallel_size, zero_stage = TOPOLOGIES[name]
    overrides = [
        f"run_dir={folder}",
        f"parallel.expert_parallel_size={expert_parallel_size}",
        f"parallel.zero_stage={zero_stage}",
        *corpus,
        *OVERRIDES,
    ]
    by_rank = run_ranks(ranks, _train, overrides)
    return [sorted(chain.from_iterable(step)) for step in zip(*by_rank, strict=True)]


def _folder(name: str) -> str:
    return "ranks_{}_expert_{}_zero_{}".format(*TOPOLOGIES[name])


def _gap(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    return max(abs(a["lm_loss"] - b["lm_loss"]) / b["lm_loss"] for a, b in zip(one, other, strict=True))


def _resumed(pairs: list[tuple[str, str]], corpus: list[str], tmp_path: Path, outcome: Callable[[str], None]) -> None:
    reference = tmp_path / "reference"
    order = _run(reference, corpus, "1 rank")
    assert len(order) == STEPS
    for saved, resumed in pairs:
        folder = tmp_path / _folder(saved)
        if not folder.exists():
            assert _run(folder, corpus, saved) == order
        again = tmp_path / f"{_folder(saved)}_to_{_folder(resumed)}"
        shutil.copytree(folder, again)
        shutil.rmtree(again / "checkpoints" / f"step_{STEPS:08d}")
        assert _run(again, corpus, resumed) == order[RESUMED:]
        gap = _gap(read_metrics(again), read_metrics(reference))
        assert gap <= 1e-5
        outcome(f"{saved} → {resumed}: gap {gap:.0e}")


@pytest.mark.fault(9)
def test_from_two_ranks_to_one(corpus: list[str], tmp_path: Path, outcome: Callable[[str], None]) -> None:
    _resumed([("2 ranks, EP 2", "1 rank")], corpus, tmp_path, outcome)


@pytest.mark.fault(9)
@pytest.mark.slow
def test_every_change_of_ranks_and_expert_parallel_size(
    corpus: list[str], tmp_path: Path, outcome: Callable[[str], None]
) -> None:
    pairs = [
        ("2 ranks", "1 rank"), ("1 rank", "2 ranks"), ("2 ranks, EP 2", "2 ranks"), ("2 ranks", "2 ranks, EP 2"),
        ("4 ranks, EP 4", "4 ranks, EP 2"), ("4 ranks, EP 4", "2 ranks, EP 2"), ("1 rank", "4 ranks, EP 4"),
    ]  # fmt: skip
    _resumed(pairs, corpus, tmp_path, outcome)
