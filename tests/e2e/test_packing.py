"""`moe train data.packing=best_fit`: the same losses at two topologies and after a resume, the same held-out text."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, read_metrics
from tests.faults.forked import moe_ranks

KEYS = [
    *SMALL, "train.steps=6", "train.eval_every=6", "train.sample_every=100", "optim.schedule=constant",
    "data.packing=best_fit",
]  # fmt: skip


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a corpus of documents of which few are longer than a sequence of SMALL."""
    folder = tmp_path_factory.mktemp("documents")
    sums = [", ".join(f"{a} + {b} = {a + b}" for b in range(1 + a * 7 % 11)) for a in range(300)]
    (folder / "sums.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in sums))
    return [f"data.path={folder / 'sums.csv'}", "data.held_out=0.2", f"data.cache_dir={folder / 'cache'}"]


@pytest.fixture(scope="module")
def whole(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    (done,) = moe_ranks("train", f"run_dir={folder}", *documents, *KEYS)
    assert done.code == 0, done.err
    assert "documents are longer than train.sequence_length=64: cut into pieces; " in done.out
    return folder


def _losses(run: Path, name: str = "lm_loss") -> list[object]:
    return [row[name] for row in read_metrics(run) if name in row]


def test_the_losses_are_those_of_other_topologies(documents: list[str], whole: Path, tmp_path: Path) -> None:
    topology = ["parallel.expert_parallel_size=2", "parallel.zero_stage=2"]
    done = moe_ranks("train", f"run_dir={tmp_path}", *documents, *KEYS, *topology, ranks=2)
    assert [one.code for one in done] == [0, 0], done[0].err
    for name in ("lm_loss", "loss", "load_balancing_loss", "val_loss"):
        assert _losses(tmp_path, name) == pytest.approx(_losses(whole, name), rel=2e-6)


def test_a_resumed_run_goes_on_with_the_same_sequences(documents: list[str], whole: Path, tmp_path: Path) -> None:
    for steps in (4, 6):
        (done,) = moe_ranks("train", f"run_dir={tmp_path}", *documents, *KEYS, f"train.steps={steps}")
        assert done.code == 0, done.err
    assert f"resuming from {tmp_path / 'checkpoints' / 'step_00000004'}" in done.out
    assert _losses(tmp_path) == _losses(whole)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ("data.packing=concat", "data.packing: best_fit → concat"),
        ("data.document_mask=false", "data.document_mask: True → False"),
    ],
)
def test_a_resume_with_another_packing_or_mask_is_refused(
    documents: list[str], whole: Path, tmp_path: Path, changed: str, line: str
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (done,) = moe_ranks("train", f"run_dir={tmp_path / 'run'}", *documents, *KEYS, "train.steps=8", changed)
    assert done.code == 2
    assert line in done.err
    assert "checkpoint.allow_changes=true" in done.err


def test_training_changes_with_packing_and_mask_but_not_what_is_evaluated(
    documents: list[str], whole: Path, tmp_path: Path
) -> None:
    """At a rate of almost zero the weights stay as they are, so an evaluation is that of the same model."""
    losses, evaluations = [], []
    for number, keys in enumerate(([], ["data.document_mask=false"], ["data.packing=concat"])):
        run = tmp_path / str(number)
        still = ["optim.lr=1e-30", "train.steps=1", "train.eval_every=1"]
        (done,) = moe_ranks("train", f"run_dir={run}", *documents, *KEYS, *still, *keys)
        assert done.code == 0, done.err
        losses += _losses(run)
        evaluations.append((_losses(run, "val_loss"), _losses(run, "val_unigram_entropy")))
    assert len(set(losses)) == 3
    assert evaluations[0] == evaluations[1] == evaluations[2]
    assert losses[0] == _losses(whole)[0]
