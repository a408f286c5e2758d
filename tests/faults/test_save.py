"""Killed saves, full disks and damaged checkpoints: which checkpoint a resume loads."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from moe.checkpoint.layout import committed
from moe.checkpoint.manifest import verify
from moe.checkpoint.reader import load, newest
from moe.checkpoint.state import TrainState
from moe.checkpoint.writer import Saver
from moe.config import CheckpointConfig
from moe.config.compose import to_yaml
from tests.distributed.training import build, config_of, engine_steps
from tests.e2e.conftest import SMALL, Run, read_metrics
from tests.ranks import run_ranks, run_until_dead

OVERRIDES = ["parallel.expert_parallel_size=2"]
TRACED = (
    "/moe/checkpoint/writer.py",
    "/moe/checkpoint/files.py",
    "/moe/durable.py",
    "/distributed/checkpoint/filesystem.py",
    "/checkpoint/hf_storage.py",
)


def _kill_at_line(count: int | None) -> list[int]:
    """From now on counts the lines that saves execute in this process, on every thread; SIGKILL at line `count`."""
    executed = [0]

    def trace(frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if event == "line":
            executed[0] += 1
            if executed[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace if frame.f_code.co_filename.endswith(TRACED) else None

    threading.settrace(trace)
    sys.settrace(trace)
    return executed


def _join(_: Saver, thread: threading.Thread) -> None:
    """Instead of Saver's own, which executes as many lines as the save takes seconds: the lines must be the same."""
    thread.join()


def _save_twice(folder: Path, victim: int, count: int | None) -> int:
    """Saves steps 1 and 2; rank `victim` is killed at line `count` of the second save (None: no rank is).

    Returns the number of lines that the second save executed on this rank.
    """
    config = config_of(OVERRIDES)
    mesh, engine = build(config)
    saver = Saver(folder, mesh, CheckpointConfig(keep=1), print, print)
    engine_steps(config, mesh, engine, 0, 1)
    saver.save(engine, TrainState(step=1, consumed=8), to_yaml(config))
    assert saver.wait()
    engine_steps(config, mesh, engine, 1, 1)
    Saver._join = _join
    lines = _kill_at_line(count if mesh.rank == victim else None)
    saver.save(engine, TrainState(step=2, consumed=16), to_yaml(config))
    saver.wait()
    sys.settrace(None)
    threading.settrace(None)  # type: ignore[arg-type]
    engine_steps(config, mesh, engine, 2, 1)
    return lines[0]


def _resume(folder: Path) -> tuple[int, list[float]]:
    """(the step it resumes from, the losses up to step 3); saves step 3."""
    config = config_of(OVERRIDES)
    mesh, engine = build(config)
    checkpoint = newest(folder, mesh, print)
    assert checkpoint is not None
    state = load(checkpoint, engine, mesh)
    saver = Saver(folder, mesh, CheckpointConfig(keep=1), print, print)
    losses = engine_steps(config, mesh, engine, state.step, 3 - state.step).losses
    saver.save(engine, TrainState(step=3, consumed=24), to_yaml(config))
    assert saver.wait()
    mesh.agree(lambda: None, "end")  # rank 0 has the store, which a rank whose save has not ended yet still asks
    return state.step, losses


def _undisturbed() -> list[float]:
    config = config_of(OVERRIDES)
    mesh, engine = build(config)
    return engine_steps(config, mesh, engine, 0, 3).losses


COMMIT = 300  # the last lines that a save executes on rank 0: manifest, rename, `latest`, removal of old ones


def _killed_at(points: int, in_commit: int, tmp_path: Path, outcome: Callable[[str], None]) -> None:
    """`points` kills spread evenly over the lines of a save, on both ranks in turn, and `in_commit` over the commit."""
    expected = run_ranks(2, _undisturbed)[0]
    lines = run_ranks(2, _save_twice, tmp_path / "whole", 0, None)
    kills = [(point % 2, 1 + round((lines[point % 2] - 2) * point / (points - 1))) for point in range(points)]
    kills += [(0, lines[0] - COMMIT + round(COMMIT * (point + 0.5) / in_commit)) for point in range(in_commit)]
    resumed_at = []
    for index, (victim, count) in enumerate(kills):
        folder = tmp_path / str(index)
        codes = run_until_dead(2, _save_twice, folder, victim, count)
        assert codes[victim] == -signal.SIGKILL
        for step, losses in run_ranks(2, _resume, folder):
            assert step in (1, 2)
            assert losses == expected[step:]
        resumed_at.append(step)
        # The killed save's partial folder has been deleted; only the complete checkpoint is there.
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest", "step_00000003"]
        assert verify(folder / "checkpoints" / "step_00000003") is None
    assert set(resumed_at) == {1, 2}, "the points don't include lines before and after the commit"
    outcome(
        f"{points} points over the {lines[0]} and {lines[1]} lines that the ranks execute, {in_commit} over the last "
        f"{COMMIT} of rank 0: {resumed_at.count(1)} resumed from the older, {resumed_at.count(2)} from the "
        "new checkpoint, all bitwise equal"
    )


@pytest.mark.fault(1)
def test_a_kill_at_a_few_points_of_a_save(tmp_path: Path, outcome: Callable[[str], None]) -> None:
    _killed_at(3, 2, tmp_path, outcome)


@pytest.mark.fault(1)
@pytest.mark.slow
def test_a_kill_at_many_points_of_a_save(tmp_path: Path, outcome: Callable[[str], None]) -> None:
    _killed_at(24, 12, tmp_path, outcome)


def _two_checkpoints(folder: Path) -> None:
    config = config_of([])
    mesh, engine = build(config)
    saver = Saver(folder, mesh, CheckpointConfig(), print, print)
    for step in (1, 2):
        engine_steps(config, mesh, engine, step - 1, 1)
        saver.save(engine, TrainState(step=step), to_yaml(config))
    assert saver.wait()


def _taken(folder: Path) -> list[tuple[str, str, str, str]]:
    """For each file of the newest checkpoint and each damage: (file, damage, the checkpoint chosen, the warning)."""
    mesh, _ = build(config_of([]))
    taken = []
    damaged = committed(folder / "checkpoints")[0]
    for path in sorted(path for path in damaged.rglob("*") if path.is_file()):
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        for damage, changed in (("truncated", content[:-1]), ("bit", bytes(flipped)), ("deleted", None)):
            path.unlink() if changed is None else path.write_bytes(changed)
            warnings: list[str] = []
            found = newest(folder, mesh, warnings.append)
            assert found is not None
            taken.append((str(path.relative_to(damaged)), damage, found.name, " ".join(warnings)))
            damaged.with_name(f"{damaged.name}.damaged").rename(damaged)
            path.write_bytes(content)
    found = newest(folder, mesh, print)
    assert found == damaged
    return taken


@pytest.mark.fault(5)
def test_every_damage_is_found_and_the_previous_checkpoint_loaded(
    tmp_path: Path, outcome: Callable[[str], None]
) -> None:
    run_ranks(1, _two_checkpoints, tmp_path)
    taken = run_ranks(1, _taken, tmp_path)[0]
    assert len(taken) >= 15
    for file, damage, found, warning in taken:
        assert found == "step_00000001", (file, damage)
        assert "step_00000002 is damaged and passed over" in warning
        assert file in warning
    outcome(f"{len(taken)} damages in {len(taken) // 3} files: all found, file named, previous checkpoint chosen")


def _save_the_damaged_step_again(folder: Path) -> list[str | None]:
    config = config_of([])
    mesh, engine = build(config)
    (folder / "checkpoints" / "step_00000002" / "state.json").unlink()
    checkpoint = newest(folder, mesh, print)
    assert checkpoint is not None
    assert load(checkpoint, engine, mesh).step == 1
    engine_steps(config, mesh, engine, 1, 1)
    saver = Saver(folder, mesh, CheckpointConfig(background=False), print, print)
    saver.save(engine, TrainState(step=2), to_yaml(config))
    assert saver.wait()
    return [verify(path) for path in committed(folder / "checkpoints")]


@pytest.mark.fault(5)
def test_a_damaged_checkpoint_is_replaced_when_its_step_is_saved_again(tmp_path: Path) -> None:
    run_ranks(1, _two_checkpoints, tmp_path)
    assert run_ranks(1, _save_the_damaged_step_again, tmp_path)[0] == [None, None]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_00000001", "step_00000002", "step_00000002.damaged"]


def _retained(folder: Path) -> list[str]:
    config = config_of([])
    mesh, engine = build(config)
    engine_steps(config, mesh, engine, 0, 1)
    saver = Saver(folder, mesh, CheckpointConfig(every=1, keep=2, keep_every=3), print, print)
    for step in range(1, 9):
        saver.save(engine, TrainState(step=step), to_yaml(config))
    saver.wait()
    return [path.name for path in committed(folder / "checkpoints")]


def _save_beside_leftovers(folder: Path) -> list[str]:
    mesh, engine = build(config_of([]))
    warnings: list[str] = []
    saver = Saver(folder, mesh, CheckpointConfig(), print, warnings.append)
    engine_steps(config_of([]), mesh, engine, 0, 1)
    saver.save(engine, TrainState(step=9), to_yaml(config_of([])))
    assert saver.wait()
    return warnings


def test_a_leftover_that_cannot_be_removed_gives_a_warning_and_the_save_succeeds(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    (root / "step_00000007.partial").mkdir(parents=True)
    (root / "step_00000008.partial").write_text("a file, on which rmtree fails")
    (warning,) = run_ranks(1, _save_beside_leftovers, tmp_path)[0]
    assert "step_00000008.partial could not be removed" in warning
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000008.partial", "step_00000009"]


def test_the_last_two_and_every_third_are_kept(tmp_path: Path) -> None:
    assert run_ranks(1, _retained, tmp_path)[0] == [f"step_{step:08d}" for step in (8, 7, 6, 3)]


def _newest(folder: Path) -> Path | None:
    mesh, _ = build(config_of([]))
    return newest(folder, mesh, print)


@pytest.mark.fault(5)
def test_a_users_copy_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    run_ranks(1, _two_checkpoints, tmp_path)
    latest = tmp_path / "checkpoints" / "step_00000002"
    shutil.copytree(latest, latest.with_name("step_00000002.bak"))
    shutil.copytree(latest, latest.with_name("step_00000009_copy"))
    assert run_ranks(1, _newest, tmp_path)[0] == latest


def _error_of_newest(folder: Path) -> str:
    mesh, _ = build(config_of([]))
    with pytest.raises(ValueError, match="checkpoint") as caught:
        newest(folder, mesh, print)
    return str(caught.value)


@pytest.mark.fault(5)
def test_deleted_checkpoints_are_reported(tmp_path: Path) -> None:
    run_ranks(1, _two_checkpoints, tmp_path)
    for folder in committed(tmp_path / "checkpoints"):
        shutil.rmtree(folder)
    assert "latest is there, but no checkpoint" in run_ranks(1, _error_of_newest, tmp_path)[0]


def _error_of_damaged(folder: Path) -> str:
    mesh, _ = build(config_of([]))
    for state in (folder / "checkpoints").glob("step_*/state.json"):
        state.unlink()
    with pytest.raises(ValueError, match="none of its 2 checkpoints is whole") as caught:
        newest(folder, mesh, print)
    return str(caught.value)


@pytest.mark.fault(5)
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path: Path) -> None:
    run_ranks(1, _two_checkpoints, tmp_path)
    assert "start another run with run_dir=" in run_ranks(1, _error_of_damaged, tmp_path)[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(kilobytes)`: the folder of a file system of that size; another call resizes it."""
    folder = tmp_path / "disk"

    def of_size(kilobytes: int) -> Path:
        options = ["-o", f"remount,size={kilobytes}k", str(folder)]
        if not folder.exists():
            folder.mkdir()
            options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mount: {done.stderr.strip()}")
        return folder

    yield of_size
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


@pytest.mark.fault(4)
def test_a_full_disk_stops_the_run_after_some_failures_and_with_room_it_resumes(
    moe: Run, corpus: list[str], small_disk: Callable[[int], Path], outcome: Callable[[str], None]
) -> None:
    disk = small_disk(1100)  # one checkpoint of 0.8 MB fits, two don't
    overrides = [
        "train",
        f"run_dir={disk}",
        *corpus,
        *SMALL,
        "checkpoint.max_failures=2",
        "train.eval_every=4",
        "train.sample_every=4",
    ]
    stopped = moe(*overrides)
    assert stopped.returncode == 2, stopped.stdout + stopped.stderr
    lines = [line for line in stopped.stderr.splitlines() if line.startswith("moe:")]
    assert len(lines) == 1
    assert "2 saves in a row have failed (checkpoint.max_failures)" in lines[0]
    assert f"{disk}/checkpoints/step_00000015: not saved" in lines[0]
    assert "No space left on device" in lines[0]
    assert "MB are free" in lines[0]
    assert sorted(path.name for path in (disk / "checkpoints").iterdir()) == ["latest", "step_00000005"]
    assert verify(disk / "checkpoints" / "step_00000005") is None
    assert len(read_metrics(disk)) >= 15
    small_disk(8000)
    done = moe(*overrides)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert [line["step"] for line in read_metrics(disk)] == list(range(1, 41))
    outcome(
        "a 1.1 MB file system: older checkpoint intact, partial ones gone, ended after 2 failures, resumed with room"
    )
