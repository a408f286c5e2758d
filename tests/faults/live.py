"""A run as a live process that tests send signals to, and the comparison of two runs to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from tests.e2e.conftest import SMALL, environment, read_metrics

OVERRIDES = ["train", *SMALL, "train.steps=60", "train.eval_every=30", "train.sample_every=30"]
ROOT = Path(__file__).resolve().parents[2]
NOT_OF_THE_CURVE = ("tokens_per_second", "step_seconds", "mfu", "slowest_rank", "straggler_seconds")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TORCHRUN_SH = ("bash", "launch/torchrun.sh")


class Live:
    """`with Live(…) as run:` a process in a session of its own, its output in files beside the run directory.

    `overrides` start with the verb; `launcher` goes before `-m moe` (or before the overrides, for a shell script).
    """

    def __init__(
        self, run_dir: Path, overrides: list[str], launcher: tuple[str, ...] = (), more: dict[str, str] | None = None
    ) -> None:
        self.run_dir = run_dir
        module = [] if launcher == TORCHRUN_SH else ["-m", "tests.faults.inject" if more and "FAULT" in more else "moe"]
        command = [*(launcher or (sys.executable,)), *module, *overrides]
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        self._out = run_dir.with_name(run_dir.name + ".out")
        with self._out.open("ab") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, env=environment(more), cwd=ROOT, start_new_session=True
            )

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        ranks = [] if self.process.poll() is not None else [*self.ranks().values()]
        for pid in [self.process.pid, *ranks]:
            send(pid, signal.SIGKILL)
        self.process.wait(10)

    @property
    def output(self) -> str:
        """stdout and stderr of everything started so far for this run directory."""
        return self._out.read_text(errors="replace")

    def ranks(self) -> dict[int, int]:
        """{rank: process id} of torchrun's living children."""
        found = {}
        for pid in _children(self.process.pid):
            try:
                settings = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended
            found |= {int(text[5:]): pid for text in settings if text.startswith(b"RANK=")}
        return found

    def until(self, condition: Callable[[], object], timeout: float = 180) -> None:
        """Wait for it; AssertionError with the output when it takes too long or the process has ended before."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout:g} s:\n{self.output[-5000:]}"
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output[-5000:]}"
            time.sleep(0.01)

    def until_step(self, step: int, timeout: float = 180) -> None:
        self.until(lambda: last_step(self.run_dir) >= step, timeout)

    def wait(self, timeout: float = 180) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended within {timeout:g} s:\n{self.output[-5000:]}") from None


def send(pid: int, number: signal.Signals) -> None:
    """The signal to one process, if it is still there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def gone(pid: int) -> bool:
    """Ended, whether or not its parent has asked for its exit code yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def last_step(run_dir: Path) -> int:
    """Of metrics.jsonl as it grows; 0 before the first line is whole."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def curve(run_dir: Path) -> list[dict[str, object]]:
    """metrics.jsonl without what a clock measured."""
    return [{key: line[key] for key in line if key not in NOT_OF_THE_CURVE} for line in read_metrics(run_dir)]


def checkpoints(run_dir: Path) -> list[int]:
    """Steps of the whole checkpoints."""
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*") if path.suffix != ".partial")


def final_state(run_dir: Path) -> dict[str, bytes | str]:
    """Every tensor of the last checkpoint, and its state.json. (The order of tensors in a file is not fixed.)"""
    folder = run_dir / "checkpoints" / f"step_{checkpoints(run_dir)[-1]:08d}"
    state: dict[str, bytes | str] = {"state.json": (folder / "state.json").read_text()}
    for path in folder.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            state[f"{path.relative_to(folder)} {name}"] = tensor.numpy().tobytes()
    return state


def assert_same_run(one: Path, other: Path) -> None:
    """Every figure of every step and every bit of the last checkpoint."""
    assert curve(one) == curve(other)
    state, expected = final_state(one), final_state(other)
    assert state.keys() == expected.keys()
    assert [name for name in state if state[name] != expected[name]] == []


def _children(pid: int) -> list[int]:
    try:
        return [
            int(word)
            for path in Path(f"/proc/{pid}/task").iterdir()
            for word in (path / "children").read_text().split()
        ]
    except OSError:
        return []
