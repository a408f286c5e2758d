"""`moe train` as a process: the files it writes, bitwise resume, and the same curve at any number of ranks."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests import forkserver
from tests.e2e.conftest import (
    SMALL,
    Run,
    allowed_by_tie,
    command,
    environment,
    queued_seconds,
    read_metrics,
    tied_step,
)

KEYS = {
    "step", "tokens", "loss", "lm_loss", "load_balancing_loss", "router_z_loss", "grad_norm", "lr", "mfu",
    "tokens_per_second", "step_seconds", "data_wait", "max_violation", "router_entropy", "dead_experts",
    "dropped_fraction", "expert_shares", "load_balancing_loss_layers", "time", "elapsed",
}  # fmt: skip
EVALUATION = {"val_loss", "val_bits_per_byte", "val_unigram_entropy", "val_loss_by_source"}
TIMED = {
    "tokens_per_second", "step_seconds", "mfu", "data_wait", "slowest_rank", "straggler_seconds", "time", "elapsed",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(moe: Run, corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 40 steps in one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = moe("train", f"run_dir={folder}", *corpus, *SMALL, anew=True)
    assert done.returncode == 0, done.stderr
    assert "experts: 4, 2 a token, grouped_mm" in done.stdout
    assert "validation loss" in done.stdout
    first = read_metrics(folder)[0]
    assert f"step 1/40 · lm_loss {first['lm_loss']:.3f} · " in done.stdout
    return folder


def test_the_run_directory_holds_everything(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "samples.jsonl", "routing.json", "report.html"} <= names
    assert [path.name for path in sorted((whole / "checkpoints").glob("step_*"))] == ["step_00000035", "step_00000040"]
    assert (whole / "checkpoints" / "latest").read_text().strip() == "step_00000040"
    routing = json.loads((whole / "routing.json").read_text())
    assert len(routing["experts"]) == 2
    assert len(routing["experts"][0]) == len(routing["tokens"])


def test_samples_continue_the_runs_own_held_out_text(whole: Path, corpus: list[str]) -> None:
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [20, 40]
    (prompt,) = {sample["prompt"] for sample in samples}
    folder = next(key for key in corpus if key.startswith("data.path=")).removeprefix("data.path=")
    assert len(prompt) > 20
    assert any(prompt in path.read_text() for path in Path(folder).iterdir())


def test_every_step_has_every_metric(whole: Path) -> None:
    metrics = read_metrics(whole)
    assert [line["step"] for line in metrics] == list(range(1, 41))
    for line in metrics:
        assert line.keys() >= KEYS
        assert (line.keys() >= EVALUATION) == (line["step"] in (20, 40))
        shares = line["expert_shares"]
        assert [len(layer) for layer in shares] == [4, 4]
        assert [sum(layer) for layer in shares] == pytest.approx([1, 1])
        # By definition: the mean over layers, from the counts of the whole global batch.
        violations = [max(layer) * len(layer) - 1 for layer in shares]
        assert line["max_violation"] == pytest.approx(sum(violations) / 2, abs=1e-6)
        assert line["loss"] == pytest.approx(
            line["lm_loss"] + 0.02 * line["load_balancing_loss"] + 0.001 * line["router_z_loss"], rel=1e-5
        )
    assert metrics[-1]["tokens"] == 40 * 4 * 64
    for key in ("time", "elapsed"):
        assert all(before[key] < after[key] for before, after in pairwise(metrics))
    assert abs(metrics[-1]["time"] - (whole / "metrics.jsonl").stat().st_mtime) < 5
    assert 0 < metrics[0]["elapsed"] < metrics[-1]["elapsed"] < 60
    assert metrics[-1]["lm_loss"] < metrics[0]["lm_loss"]


def _flat(value: object) -> list[float]:
    if isinstance(value, list):
        return [one for item in value for one in _flat(item)]
    return [math.nan if value is None else float(str(value))]


def _same_curve(one: Path, other: Path, tolerance: float) -> None:
    tied = tied_step(read_metrics(one), read_metrics(other))
    for a, b in zip(read_metrics(one), read_metrics(other), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - TIMED - {"expert_shares", "val_loss_by_source"}:
            if tolerance == 0:
                assert a[key] == b[key], key
                continue
            # Norm and entropy are computed in more steps than the losses, so they get ten times the tolerance. A loss
            # without an expert is the small difference of two.
            allowed = tolerance if "loss" in key else 10 * tolerance
            absolute = 10 * tolerance if key == "loss_without_expert" else 1e-9
            if a["step"] == tied:
                absolute = max(absolute, allowed_by_tie(key))
            assert _flat(a[key]) == pytest.approx(_flat(b[key]), rel=allowed, abs=absolute, nan_ok=True), key
    assert tolerance > 0 or tied is None


def test_the_same_command_resumes_after_a_kill_and_the_curve_is_bitwise_the_same(
    moe: Run, corpus: list[str], whole: Path, tmp_path: Path
) -> None:
    overrides = ("train", f"run_dir={tmp_path}", *corpus, *SMALL)
    metrics = tmp_path / "metrics.jsonl"
    with forkserver.Popen(command(overrides), env=environment(), stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 12):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    done = moe(*overrides)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    _same_curve(tmp_path, whole, 0.0)
    elapsed = [line["elapsed"] for line in read_metrics(tmp_path)]
    assert elapsed == sorted(elapsed), "the seconds of training go on where the checkpoint had them"
    again = moe(*overrides)
    assert again.returncode == 0
    assert "is finished at step 40" in again.stdout


@pytest.mark.parametrize(
    ("overrides", "anew"),
    [
        (["parallel.expert_parallel_size=1"], False),
        (["parallel.expert_parallel_size=2", "parallel.zero_stage=2"], True),
    ],
)
def test_two_ranks_give_the_same_curve(
    moe: Run, corpus: list[str], whole: Path, tmp_path: Path, overrides: list[str], anew: bool
) -> None:
    done = moe("train", f"run_dir={tmp_path}", *corpus, *SMALL, *overrides, ranks=2, anew=anew)
    assert done.returncode == 0, done.stderr
    _same_curve(tmp_path, whole, 1e-6)
    assert done.stdout.count("validation loss") == 2, "only rank 0 prints"


@pytest.mark.slow
def test_dense_and_capacity_run_too(moe: Run, corpus: list[str], tmp_path: Path) -> None:
    dense = moe("train", f"run_dir={tmp_path / 'dense'}", *corpus, *SMALL, "model.mlp=dense", "train.steps=3")
    assert dense.returncode == 0, dense.stderr
    last = read_metrics(tmp_path / "dense")[-1]
    assert last["max_violation"] is None
    assert last["expert_shares"] == []
    overrides = [*SMALL, "router.capacity_factor=0.5", "train.precision=bfloat16", "train.steps=3"]
    tight = moe("train", f"run_dir={tmp_path / 'tight'}", *corpus, *overrides)
    assert tight.returncode == 0, tight.stderr
    # Half the capacity that balance needs: at least half of the choices are dropped.
    assert read_metrics(tmp_path / "tight")[-1]["dropped_fraction"] >= 0.5


def test_a_start_in_bfloat16_prints_nothing_of_deepspeeds(moe: Run, corpus: list[str], tmp_path: Path) -> None:
    done = moe("train", f"run_dir={tmp_path / 'run'}", *corpus, *SMALL, "train.precision=bfloat16", "train.steps=2")
    assert done.returncode == 0, done.stderr
    assert "bfloat16 on cpu" in done.stdout
    assert not [line for line in done.stdout.splitlines() if "bf16" in line or "Virtual Memory" in line]


def test_generate_and_report_read_the_run(moe: Run, whole: Path) -> None:
    overrides = ["generate", f"checkpoint={whole}", "prompt=3 plus 4", "max_new_tokens=8", "temperature=0"]
    first, second = moe(*overrides), moe(*overrides)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("3 plus 4")
    assert first.stdout == second.stdout
    report = moe("report", str(whole))
    assert report.returncode == 0, report.stderr
    assert Path(report.stdout.strip()).read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_a_model_takes_its_vocabulary_from_an_existing_tokenizer(
    moe: Run, corpus: list[str], whole: Path, tmp_path: Path
) -> None:
    """The run's files have the number, so a resume, `moe generate` and `moe plan` agree with it."""
    model = whole / "checkpoints/step_00000040/tokenizer/tokenizer.model"
    pieces = json.loads((model.parent / "moe_tokenizer.json").read_text())["vocab_size"]
    unstated = [key for key in SMALL if not key.startswith("model.vocab_size=")]
    overrides = [*corpus, *unstated, "tokenizer=model_file", f"tokenizer.path={model}", f"run_dir={tmp_path}"]
    flat = ("optim.schedule=constant", "train.steps=5")
    for steps in flat, ("optim.schedule=constant", "train.steps=6"):
        done = moe("train", *overrides, *steps)
        assert done.returncode == 0, done.stderr
    assert f"resuming from {tmp_path}/checkpoints/step_00000005" in done.stdout
    assert f"vocab_size: {pieces}\n" in (tmp_path / "config.yaml").read_text()
    text = moe("generate", f"checkpoint={tmp_path}", "prompt=3 plus 4", "max_new_tokens=2")
    assert text.returncode == 0, text.stderr
    plan = moe("plan", *overrides, "plan.json=true")
    assert f"model: {json.loads(plan.stdout)['parameters']['total']:,} parameters" in done.stdout


def test_a_checkpoint_of_another_model_is_an_error(moe: Run, corpus: list[str], whole: Path) -> None:
    failed = moe("train", f"run_dir={whole}", *corpus, *SMALL, "model.hidden_size=64", "train.steps=9")
    _one_line(failed, 2, "model.hidden_size=64, but the checkpoint")


@pytest.mark.slow
def test_a_full_disk_loses_a_checkpoint_and_the_run_continues(moe: Run, corpus: list[str], tmp_path: Path) -> None:
    """After step 5 no file can grow past 200 kB: older checkpoints stay, training continues, the exit code is 2."""
    overrides = ["train", f"run_dir={tmp_path}", *corpus, *SMALL]
    assert moe(*overrides, "train.steps=5").returncode == 0
    longer = ("train.steps=12", "checkpoint.allow_changes=true")
    full = moe(*overrides, *longer, more={"PYTHONPATH": str(Path(__file__).parent / "full_disk")})
    _one_line(full, 2, "the last checkpoint could not be saved")
    assert "step_00000010: not saved" in full.stdout
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 13))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000005"]


def _seconds_to_first_step(overrides: list[str]) -> float:
    """Without the time that the process was ready to run and waited for a core."""
    started = time.monotonic()
    with subprocess.Popen(command(tuple(overrides)), env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                break
        seconds = time.monotonic() - started
        assert process.poll() is None, "the run ended before its first step"
        seconds -= queued_seconds(process.pid)
        process.send_signal(signal.SIGKILL)
    return seconds


@pytest.mark.slow
def test_a_resume_reaches_its_first_step_as_soon_as_a_fresh_start(moe: Run, corpus: list[str], tmp_path: Path) -> None:
    overrides = ["train", *corpus, *SMALL, "model.hidden_size=256", "model.intermediate_size=512", "train.steps=400"]
    done = moe(*overrides, f"run_dir={tmp_path / 'run'}", "train.steps=2")
    assert done.returncode == 0, done.stderr
    more = [f"run_dir={tmp_path / 'run'}", "checkpoint.allow_changes=true"]
    fresh = [f"run_dir={tmp_path / 'fresh'}"]
    assert _seconds_to_first_step([*overrides, *more]) < 5 + _seconds_to_first_step([*overrides, *fresh])


def _one_line(done: subprocess.CompletedProcess[str], code: int, text: str) -> None:
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("moe:")]
    assert len(lines) == 1, done.stderr
    assert text in lines[0]
    assert "Traceback" not in done.stderr
