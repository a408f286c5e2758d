"""Claims, seeds, duplicates and lost trials; nothing is trained, the files that training would write are made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from moe.config import Pruner, Sampler, SweepSettings
from moe.config.compose import load_config
from moe.sweep.definition import Definition, define
from moe.sweep.metrics import Metrics
from moe.sweep.storage import open_storage
from moe.sweep.study import MAX_LOST, Claimed, Study

CONTINUOUS = {"router.aux_loss_coef": "tag(log, interval(1e-4, 1e-1))", "router.z_loss_coef": "choice(0, 0.001)"}


def _definition(space: dict[str, str], **settings: Any) -> Definition:
    settings = {"trials": 4, "sampler": Sampler.random, **settings}
    return define(SweepSettings(space=space, overrides=["engine=plain", "tracking=none"], **settings), [], load_config)


def _study(folder: Path, definition: Definition, storage: str | None = None) -> Study:
    folder.mkdir(exist_ok=True)
    return Study(folder, "study", definition, open_storage(storage, folder), load_config)


def _trained(claimed: Claimed, loss: float = 5.0, **more: Any) -> Metrics:
    row = {"step": 1, "tokens": 32, "val_loss": loss, "max_violation": 1.5, **more}
    (claimed.run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    metrics = Metrics(claimed.run_dir / "metrics.jsonl")
    metrics.read()
    return metrics


def _all(study: Study) -> list[Claimed]:
    """Trains until nothing is left."""
    done = []
    while (claimed := study.claim()) is not None:
        study.finish(claimed, TrialState.COMPLETE, _trained(claimed))
        done.append(claimed)
    return done


def test_the_budget_ends_it_and_points_depend_on_the_number_alone(tmp_path: Path) -> None:
    definition = _definition(CONTINUOUS)
    first = [claimed.params for claimed in _all(_study(tmp_path / "one", definition))]
    assert len(first) == 4
    again = []
    for _ in range(4):  # a new process for each
        study = _study(tmp_path / "two", definition)
        claimed = study.claim()
        assert claimed is not None
        study.finish(claimed, TrialState.COMPLETE, _trained(claimed))
        again.append(claimed.params)
    assert again == first
    assert _study(tmp_path / "two", definition).claim() is None


def test_nothing_is_trained_twice(tmp_path: Path) -> None:
    study = _study(tmp_path, _definition({"router.z_loss_coef": "choice(0, 0.001)"}, trials=10))
    assert sorted(claimed.params["router.z_loss_coef"] for claimed in _all(study)) == [0, 0.001]
    assert study.exhausted
    assert len(study.finished()) == 2


@pytest.mark.parametrize("sampler", [Sampler.random, Sampler.tpe, Sampler.nsga2])
def test_each_point_gets_its_seeds(tmp_path: Path, sampler: Sampler) -> None:
    study = _study(tmp_path, _definition(CONTINUOUS, trials=6, seeds=3, sampler=sampler))
    done = _all(study)
    points = {claimed.params["router.aux_loss_coef"] for claimed in done}
    assert len(points) == 2
    assert sorted((claimed.params["router.aux_loss_coef"], claimed.seed) for claimed in done) == sorted(
        (point, seed) for point in points for seed in range(3)
    )


def test_a_grid_trains_every_point_once_and_each_seed_in_turn(tmp_path: Path) -> None:
    space = {"router.top_k": "2,3", "router.z_loss_coef": "range(0, 0.3, 0.1)"}
    done = _all(_study(tmp_path, _definition(space, sampler=Sampler.grid, trials=None, seeds=2)))
    assert [claimed.seed for claimed in done] == [0] * 6 + [1] * 6
    assert len({(*claimed.params.values(), claimed.seed) for claimed in done}) == 12


def test_a_trial_in_hand_is_not_given_out_again_and_a_lost_one_is(tmp_path: Path) -> None:
    definition = _definition(CONTINUOUS)
    one, other = _study(tmp_path, definition), _study(tmp_path, definition)
    mine, theirs = one.claim(), other.claim()
    assert mine is not None
    assert theirs is not None
    assert (mine.number, theirs.number) == (0, 1)
    mine.lease.close()  # as the kernel does when its process dies
    again = other.claim()
    assert again is not None
    assert (again.number, again.params) == (0, mine.params)


LOSE = """
import sys
from tests.unit.sweep.test_study import CONTINUOUS, Path, _definition, _study
claimed = _study(Path(sys.argv[1]), _definition(CONTINUOUS)).claim()
print(claimed.number, flush=True)
import os, signal; os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_trial_that_is_always_lost_fails_unless_it_gets_further(tmp_path: Path) -> None:
    definition = _definition(CONTINUOUS)
    for _ in range(MAX_LOST):
        done = subprocess.run([sys.executable, "-c", LOSE, str(tmp_path)], capture_output=True, text=True, check=False)
        assert done.stdout == "0\n", done.stderr
    study = _study(tmp_path, definition)
    (tmp_path / "trials/0000/checkpoints/step_00000005").mkdir(parents=True)
    claimed = study.claim()
    assert claimed is not None
    assert claimed.number == 0, "it has a new checkpoint"
    for _ in range(MAX_LOST):
        assert claimed is not None
        assert claimed.number == 0
        study.release(claimed, "ended with code -9", stopped=False)
        claimed = study.claim()
    assert claimed is not None
    assert claimed.number == 1
    (failed,) = study.finished()
    assert failed.user_attrs["error"] == f"lost {MAX_LOST} times at checkpoint 5: ended with code -9"


def test_a_trial_that_was_stopped_on_purpose_is_not_lost(tmp_path: Path) -> None:
    study = _study(tmp_path, _definition(CONTINUOUS))
    for _ in range(MAX_LOST + 2):
        claimed = study.claim()
        assert claimed is not None
        assert claimed.number == 0
        study.release(claimed, "SIGTERM", stopped=True)


def test_a_missing_metric_is_kept_empty_and_a_broken_one_fails(tmp_path: Path) -> None:
    study = _study(tmp_path, _definition(CONTINUOUS))
    for loss, violation in ((5.0, None), (float("nan"), 1.0)):
        claimed = study.claim()
        assert claimed is not None
        study.finish(claimed, TrialState.COMPLETE, _trained(claimed, loss, max_violation=violation))
    dense, diverged = (trial.user_attrs for trial in study.finished())
    assert (dense["state"], dense["metrics"]) == ("COMPLETE", {"val_loss": 5.0, "max_violation": None})
    assert (diverged["state"], diverged["error"]) == ("FAIL", "val_loss is not a finite number")


def test_importance_is_that_of_the_good_end_whichever_end_it_is(tmp_path: Path) -> None:
    found = []
    for sign, maximize in ((1, []), (-1, ["val_loss"])):
        definition = _definition(CONTINUOUS, objectives=["val_loss"], maximize=maximize, trials=30)
        study = _study(tmp_path / str(sign), definition)
        while (claimed := study.claim()) is not None:
            coefficient, z = claimed.params["router.aux_loss_coef"], claimed.params["router.z_loss_coef"]
            loss = 1.0 + z if coefficient < 1e-3 else 50 * coefficient
            study.finish(claimed, TrialState.COMPLETE, _trained(claimed, sign * loss))
        found.append(study.importance()["val_loss"])
    assert found[0] == pytest.approx(found[1])


@pytest.mark.parametrize("pruner", [Pruner.median, Pruner.hyperband])
def test_a_trial_worse_than_the_others_is_pruned(tmp_path: Path, pruner: Pruner) -> None:
    definition = _definition(CONTINUOUS, objectives=["val_loss"], pruner=pruner, trials=12)
    study, pruned = _study(tmp_path, definition), 0
    for number in range(12):
        claimed = study.claim()
        assert claimed is not None
        loss = 5.0 + number
        stops = any(study.should_prune(claimed, step, loss) for step in range(50, 300, 50))
        pruned += stops
        study.finish(claimed, TrialState.PRUNED if stops else TrialState.COMPLETE, _trained(claimed, loss))
    assert pruned > 0
    assert {trial.state for trial in study.finished()} == {TrialState.PRUNED, TrialState.COMPLETE}


def test_a_budget_of_tokens_counts_what_is_running(tmp_path: Path) -> None:
    definition = _definition(CONTINUOUS, trials=None, tokens=3)
    study = _study(tmp_path, definition)
    running = study.claim()
    assert running is not None
    assert study.claim() is None, "the running one will spend it"
