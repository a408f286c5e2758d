"""`moe sweep` as users run it: real processes, killed and started again."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, Run
from tests.faults.live import Live, checkpoints, last_step

TRIAL = [
    *SMALL, "engine=plain", "train.steps=30", "train.eval_every=10", "train.eval_sequences=4", "train.sample_tokens=2",
    "train.sequence_length=32", "train.micro_batch_size=1", "train.global_batch_size=2", "checkpoint.keep=1",
]  # fmt: skip
pytestmark = pytest.mark.timeout(1000)  # a hang's limit: trials take seconds
QUICK = ["sweep", "sweep=router_quick", "sweep.trials=4", "sweep.workers=1"]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def results(folder: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(folder)]


def _commands() -> list[str]:
    """Command lines of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


@pytest.fixture(scope="module")
def whole(moe: Run, corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that nobody interrupted."""
    folder = tmp_path_factory.mktemp("sweep") / "whole"
    done = moe(*QUICK, *TRIAL, *corpus, f"run_dir={folder}", timeout=900)
    assert done.returncode == 0, done.stderr
    assert "trial 3: COMPLETE · val_loss " in done.stdout
    assert "3 of 4 trials done · about " in done.stdout
    return folder


def test_a_row_a_finished_trial_and_a_run_directory_each(whole: Path) -> None:
    found = rows(whole)
    assert [row["state"] for row in found] == ["COMPLETE"] * 4
    assert {"params.router.aux_loss_coef", "params.router.z_loss_coef", "seed", "val_loss", "max_violation"} <= {
        *found[0]
    }
    for row in found:
        assert 1e-4 <= float(row["params.router.aux_loss_coef"]) <= 1e-1
        assert float(row["val_loss"]) > 0
        assert float(row["max_violation"]) > 0
        assert last_step(whole / row["run_dir"]) == 30
    assert len({row["params.router.aux_loss_coef"] for row in found}) == 4
    page = (whole / "report.html").read_text()
    assert "moe train model=tiny " in page
    assert len(page) < 6e6


def test_the_same_command_again_trains_nothing(whole: Path, moe: Run, corpus: list[str]) -> None:
    before = results(whole)
    done = moe(*QUICK, *TRIAL, *corpus, f"run_dir={whole}", timeout=900)
    assert done.returncode == 0, done.stderr
    assert "trial 0" not in done.stdout
    assert results(whole) == before


@pytest.mark.slow
def test_killed_half_way_it_is_finished_by_the_same_command(whole: Path, corpus: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    command = [*QUICK, *TRIAL, *corpus, f"run_dir={folder}"]
    with Live(folder, command) as run:
        run.until(lambda: (folder / "trials/0001/checkpoints/latest").exists(), 600)
        os.killpg(run.process.pid, signal.SIGKILL)
        run.wait()
    assert [row["trial"] for row in rows(folder)] == ["0"]
    reached = checkpoints(folder / "trials/0001")[-1]
    assert reached < 30
    with Live(folder, command) as run:
        assert run.wait(600) == 0, run.output
        assert "trial 1: router.aux_loss_coef=" in run.output
        assert ", goes on after step " in run.output
    assert results(folder) == results(whole)
    assert "resum" in (folder / "trials/0001/output.txt").read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_kill_9_of_the_sweep_alone_ends_its_trial_which_then_goes_on(corpus: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    command = [*QUICK, *TRIAL, *corpus, f"run_dir={folder}", "sweep.trials=1"]
    with Live(folder, command) as run:
        run.until(lambda: last_step(folder / "trials/0000") > 1, 600)
        os.kill(run.process.pid, signal.SIGKILL)
        run.wait()
        deadline = time.monotonic() + 20
        while any(f"run_dir={folder}" in text for text in _commands()):
            assert time.monotonic() < deadline, "its trial trains on"
            time.sleep(0.1)
    with Live(folder, command) as run:
        assert run.wait(600) == 0, run.output
    assert [row["state"] for row in rows(folder)] == ["COMPLETE"]


@pytest.mark.slow
def test_sigterm_lets_the_trials_save_and_the_same_command_goes_on(
    whole: Path, corpus: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    command = [*QUICK, *TRIAL, *corpus, f"run_dir={folder}", "sweep.workers=2"]
    with Live(folder, command) as run:
        run.until(lambda: last_step(folder / "trials/0000") > 1 and last_step(folder / "trials/0001") > 1, 600)
        run.process.terminate()
        assert run.wait(600) == 128 + signal.SIGTERM, run.output
        assert "SIGTERM: stopped; finished trials are in " in run.output
    assert (folder / "trials/0000/checkpoints/latest").exists()
    assert not any(f"run_dir={folder}" in text for text in _commands()), "a trial was left behind"
    with Live(folder, command) as run:
        assert run.wait(600) == 0, run.output
    by_params = {row["params.router.aux_loss_coef"]: row["val_loss"] for row in results(whole)}
    assert {row["params.router.aux_loss_coef"]: row["val_loss"] for row in results(folder)} == by_params


@pytest.mark.slow
def test_a_trial_that_crashes_is_recorded_and_the_others_go_on(moe: Run, corpus: list[str], tmp_path: Path) -> None:
    preset = tmp_path / "arms.yaml"
    preset.write_text(
        """
sampler: points
objectives: [val_loss, router_entropy]
points:
  good: []
  bad: [data.path=/nowhere]
  dense: [model.mlp=dense]
  early:
    - train.eval_every=1
    - optim.lr=1e-30
    - checkpoint.metric_for_best_model=val_loss
    - checkpoint.early_stopping_patience=1
seeds: 2
"""
    )
    folder = tmp_path / "arms"
    done = moe("sweep", f"sweep={preset}", *TRIAL, *corpus, "train.steps=3", f"run_dir={folder}", timeout=900)
    assert done.returncode == 0, done.stderr
    found = {(row["params.point"], row["seed"]): row for row in rows(folder)}
    assert {key: row["state"] for key, row in found.items()} == {
        **{("good", seed): "COMPLETE" for seed in "01"},
        **{("bad", seed): "FAIL" for seed in "01"},
        **{("dense", seed): "COMPLETE" for seed in "01"},
        **{("early", seed): "COMPLETE" for seed in "01"},
    }
    assert (found["good", "0"]["steps"], found["early", "0"]["steps"]) == ("3", "2")
    assert found["bad", "0"]["error"].startswith("exit code 2: moe: ")
    assert found["dense", "0"]["max_violation"] == found["dense", "0"]["router_entropy"] == ""
    assert float(found["dense", "0"]["val_loss"]) > 0


@pytest.mark.slow
def test_when_all_fail_the_sweep_ends_and_says_why(moe: Run, corpus: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "failing"
    quick = ["sweep", "sweep=router_quick", "sweep.trials=2", *TRIAL, *corpus, "data.path=/nowhere"]
    for _ in range(2):
        done = moe(*quick, f"run_dir={folder}", timeout=900)
        assert done.returncode == 2
        assert "moe: all 2 trials failed; trial 0: exit code 2: moe: " in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert [row["state"] for row in rows(folder)] == ["FAIL", "FAIL"]


def test_a_metric_that_does_not_exist_names_those_that_do(moe: Run, corpus: list[str], tmp_path: Path) -> None:
    done = moe(*QUICK, *TRIAL, *corpus, "sweep.objectives=[val_los]", f"run_dir={tmp_path / 'sweep'}", timeout=900)
    assert done.returncode == 2
    assert "sweep.objectives: val_los: no such metric; did you mean val_loss? There are " in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_two_sweeps_in_one_folder_and_another_space_are_refused(whole: Path, moe: Run, corpus: list[str]) -> None:
    done = moe(
        *QUICK, *TRIAL, *corpus, f"run_dir={whole}", "sweep.space.router.z_loss_coef=0,1", "optim.lr=1", timeout=900
    )
    assert done.returncode == 2
    assert "holds the study of another sweep: sweep.space.router.z_loss_coef: choice(0, 0.001, 0.01) → 0,1; " in (
        done.stderr
    )
    assert "optim.lr: 0.003 → 1.0; set it back" in done.stderr
    held = Live(whole, [*QUICK, *TRIAL, *corpus, f"run_dir={whole}", "sweep.trials=99"])
    with held:
        held.until(lambda: (whole / "trials/0004/.lease").exists(), 600)
        done = moe(*QUICK, *TRIAL, *corpus, f"run_dir={whole}", timeout=900)
        assert done.returncode == 2
        assert f"run_dir={whole} is in use by process {held.process.pid}" in done.stderr
        os.killpg(held.process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_train_m_gives_each_combination_a_run_directory(moe: Run, corpus: list[str], tmp_path: Path) -> None:
    swept = ["router=topk", "router.aux_loss_coef=0.001,0.01"]
    done = moe("train", "-m", *swept, *TRIAL, *corpus, "train.steps=2", f"run_dir={tmp_path}/runs", timeout=900)
    assert done.returncode == 0, done.stderr
    for number, coefficient in enumerate(("0.001", "0.01")):
        assert f"aux_loss_coef: {coefficient}\n" in (tmp_path / f"runs/{number}/config.yaml").read_text()
        assert last_step(tmp_path / f"runs/{number}") == 2


@pytest.mark.slow
def test_a_job_that_fails_lets_the_others_run(moe: Run, corpus: list[str], tmp_path: Path) -> None:
    broken = ["data.path=/nowhere," + next(one for one in corpus if one.startswith("data.path="))[10:]]
    rest = [one for one in corpus if not one.startswith("data.path=")]
    done = moe("train", "-m", *broken, *TRIAL, *rest, "train.steps=2", f"run_dir={tmp_path}/runs", timeout=900)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "moe: 1 of 2 jobs failed (see above): 0"
    assert last_step(tmp_path / "runs/1") == 2


def test_hydras_joblib_launcher_runs_jobs(moe: Run, corpus: list[str], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install hydra-joblib-launcher")
    swept = ["optim.lr=0.001,0.002", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = moe("train", "-m", *swept, *TRIAL, *corpus, "train.steps=2", f"run_dir={tmp_path}/runs", timeout=900)
    assert done.returncode == 0, done.stderr
    assert [last_step(tmp_path / f"runs/{number}") for number in (0, 1)] == [2, 2]


@pytest.mark.slow
def test_commands_that_join_share_one_study(corpus: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "joined"
    command = [*QUICK, *TRIAL, *corpus, "train.steps=2", f"run_dir={folder}", "sweep.join=true", "sweep.workers=1"]
    with Live(tmp_path / "one", command) as one, Live(tmp_path / "other", command) as other:
        assert one.wait(600) == 0, one.output
        assert other.wait(600) == 0, other.output
        both = [run.output.count("COMPLETE") for run in (one, other)]
    assert sum(both) == 4
    assert [row["state"] for row in rows(folder)] == ["COMPLETE"] * 4


@pytest.mark.slow
def test_24_trials_killed_half_way(corpus: list[str], tmp_path: Path) -> None:
    def sweep(folder: Path, trials: int) -> list[str]:
        more = [
            "sweep.workers=2",
            "sweep.sampler=random",
            f"sweep.trials={trials}",
            "train.steps=12",
            "checkpoint.every=4",
        ]
        return [*QUICK, *TRIAL, *corpus, f"run_dir={folder}", *more]

    with Live(tmp_path / "whole", sweep(tmp_path / "whole", 10)) as run:
        assert run.wait(3000) == 0, run.output
    for trial in (7, 15):
        with Live(tmp_path / "killed", sweep(tmp_path / "killed", 24)) as run:
            run.until(lambda trial=trial: last_step(tmp_path / f"killed/trials/{trial:04d}") > 5, 3000)
            os.killpg(run.process.pid, signal.SIGKILL)
            run.wait()
    with Live(tmp_path / "killed", sweep(tmp_path / "killed", 24)) as run:
        assert run.wait(3000) == 0, run.output
    found = results(tmp_path / "killed")
    assert [row["state"] for row in found] == ["COMPLETE"] * 24
    assert found[:10] == results(tmp_path / "whole"), "the n-th trial depends on n, not on how many there are"
