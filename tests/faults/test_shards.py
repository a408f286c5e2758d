"""Token shards that are damaged: before a run they are found and prepared again; a cut in mid-run ends all ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.forked import moe_ranks
from tests.faults.live import OVERRIDES, TORCHRUN, Live, assert_same_run, gone, send

SHORT = "train.steps=15"
Outcome = Callable[[str], None]
SHARDS = ("train/00000.bin", "train/documents.bin", "held_out/00000.bin", "held_out/documents.bin")


def _own_cache(corpus: list[str], tmp_path: Path) -> list[str]:
    """The corpus in a cache of its own, which the test may damage."""
    return [*(key for key in corpus if not key.startswith("data.cache_dir=")), f"data.cache_dir={tmp_path / 'cache'}"]


def _shard(tmp_path: Path, name: str) -> Path:
    (path,) = (tmp_path / "cache").glob(f"*/text/{name}")
    return path


@pytest.mark.fault(18)
def test_changed_bytes_are_named_and_the_corpus_is_prepared_again(
    corpus: list[str], undisturbed: Callable[..., Path], tmp_path: Path, outcome: Outcome
) -> None:
    mine = _own_cache(corpus, tmp_path)
    (prepared,) = moe_ranks("prepare", *OVERRIDES[1:], *mine)
    assert prepared.code == 0, prepared.err
    for name in SHARDS:
        path = _shard(tmp_path, name)
        good, stat = path.read_bytes(), path.stat()
        path.write_bytes(bytes([good[0] ^ 1, *good[1:-1], good[-1] ^ 1]))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        run_dir = tmp_path / name.replace("/", "-")
        done = moe_ranks(*OVERRIDES, SHORT, *mine, f"run_dir={run_dir}", ranks=2)
        assert [one.code for one in done] == [0, 0], done[0].err
        lines = [line for one in done for line in (one.out + one.err).splitlines() if "preparing again" in line]
        assert len(lines) == 1, lines
        assert f"warning: {path}: " in lines[0]
        assert path.read_bytes() == good
        assert_same_run(run_dir, undisturbed(2, SHORT))
    outcome(
        f"bytes changed at equal size, in {len(SHARDS)} files: each found before the first step and named in one line "
        "by one of two ranks, prepared again, bitwise equal"
    )


@pytest.mark.fault(18)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["train/00000.bin", "train/documents.bin"])
def test_a_shard_that_is_cut_in_mid_run_ends_all_ranks(
    corpus: list[str], undisturbed: Callable[..., Path], tmp_path: Path, outcome: Outcome, name: str
) -> None:
    mine, folder = _own_cache(corpus, tmp_path), tmp_path / "run"
    overrides = [*OVERRIDES, *mine, f"run_dir={folder}"]
    with Live(folder, overrides, (*TORCHRUN, "--max-restarts", "0")) as run:
        run.until_step(12)
        ranks = [*run.ranks().values()]
        path = _shard(tmp_path, name)
        size = path.stat().st_size
        os.truncate(path, size // 2)
        assert run.wait(60) == 1, run.output
        assert all(gone(pid) for pid in ranks)
    line = f"moe: {path}: was cut after it was opened: it has {size // 2} bytes, and "
    assert line in run.output
    assert "Bus error" not in run.output
    with Live(folder, overrides, TORCHRUN) as run:
        assert run.wait() == 0, run.output
    assert f"{path}: has {size // 2} bytes instead of {size}: the cache is damaged; preparing again" in run.output
    assert "resuming from" in run.output
    assert_same_run(folder, undisturbed(2))
    outcome(
        f"{name} cut to half in mid-run: named in one line, both ranks ended with exit code 1; the same command "
        "prepared it again and resumed, bitwise equal"
    )


@pytest.mark.fault(18)
@pytest.mark.slow
def test_one_process_ends_with_one_line_and_resumes(
    corpus: list[str], undisturbed: Callable[..., Path], tmp_path: Path, outcome: Outcome
) -> None:
    mine, folder = _own_cache(corpus, tmp_path), tmp_path / "run"
    overrides = [*OVERRIDES, *mine, f"run_dir={folder}"]
    with Live(folder, overrides) as run:
        run.until_step(12)
        send(run.process.pid, signal.SIGSTOP)  # so that the run can't end before the cut
        path = _shard(tmp_path, "train/00000.bin")
        os.truncate(path, path.stat().st_size // 2)
        send(run.process.pid, signal.SIGCONT)
        assert run.wait(60) == 1, run.output
    assert f"moe: {path}: was cut after it was opened: it has " in run.output
    assert "Traceback" not in run.output
    with Live(folder, overrides) as run:
        assert run.wait() == 0, run.output
    assert "resuming from" in run.output
    assert_same_run(folder, undisturbed(1))
    outcome("one process: a shard cut in mid-run is one line and exit code 1; resumed, bitwise equal")
