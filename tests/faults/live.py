"""A run as a live process that tests send signals to; bitwise comparison of two runs."""

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

from tests import forkserver
from tests.e2e.conftest import SMALL, environment, read_metrics

OVERRIDES = ["train", *SMALL, "train.steps=60", "train.eval_every=30", "train.sample_every=30"]
ROOT = Path(__file__).resolve().parents[2]
TIMED = (
    "tokens_per_second", "step_seconds", "mfu", "data_wait", "slowest_rank", "straggler_seconds", "time", "elapsed",
)  # fmt: skip
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TORCHRUN_SH = ("bash", "launch/torchrun.sh")


class Live:
    """`with Live(…) as run:` starts a process in its own session; its output goes to a file beside the run directory.

    `overrides` start with the verb; `launcher` goes before `-m moe` (or before the overrides, for a shell script).
    `anew`: Python starts anew, as for a user; otherwise it is forked, and so are torchrun's ranks.
    """

    def __init__(
        self,
        run_dir: Path,
        overrides: list[str],
        launcher: tuple[str, ...] = (),
        more: dict[str, str] | None = None,
        *,
        anew: bool = False,
    ) -> None:
        self.run_dir = run_dir
        module = [] if launcher == TORCHRUN_SH else ["-m", "tests.faults.inject" if more and "FAULT" in more else "moe"]
        command = [*(launcher or (sys.executable,)), *module, *overrides]
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        self._out = run_dir.with_name(run_dir.name + ".out")
        with self._out.open("ab") as out:
            self.process = (subprocess if anew else forkserver).Popen(
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
        """{rank: process id} of torchrun's live children."""
        found = {}
        for pid in _children(self.process.pid):
            try:
                settings = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended
            found |= {int(text[5:]): pid for text in settings if text.startswith(b"RANK=")}
        return found

    def until(self, condition: Callable[[], object], timeout: float = 180) -> None:
        """Waits until `condition()`; AssertionError with the output after `timeout` s, or if the process ends first."""
        deadline = time.monotonic() + timeout
        while not condition():
            # Asked again: it may have become true since, and the process ended.
            in_time = time.monotonic() < deadline or condition()
            assert in_time, f"not within {timeout:g} s:\n{self.output[-5000:]}"
            in_life = self.process.poll() is None or condition()
            assert in_life, f"ended with {self.process.returncode}:\n{self.output[-5000:]}"
            time.sleep(0.01)

    def until_step(self, step: int, timeout: float = 180) -> None:
        self.until(lambda: last_step(self.run_dir) >= step, timeout)

    def wait(self, timeout: float = 180) -> int:
        """Waits for the end; returns the exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended within {timeout:g} s:\n{self.output[-5000:]}") from None


def send(pid: int, number: signal.Signals) -> None:
    """Sends the signal to one process, if it still exists."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def gone(pid: int) -> bool:
    """True if the process has ended, also while its parent hasn't read its exit code yet (a zombie)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def last_step(run_dir: Path) -> int:
    """The last complete step in a growing metrics.jsonl; 0 before the first."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    complete = [line for line in lines[-2:] if line.endswith(b"\n")]
    return int(json.loads(complete[-1])["step"]) if complete else 0


def curve(run_dir: Path) -> list[dict[str, object]]:
    """metrics.jsonl without the metrics that are measured times."""
    return [{key: line[key] for key in line if key not in TIMED} for line in read_metrics(run_dir)]


def checkpoints(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*") if path.suffix != ".partial")


def final_state(run_dir: Path) -> dict[str, bytes | str]:
    """Every tensor of the last checkpoint by file and name (their order in a file is not fixed), and state.json without
    its measured time."""
    folder = run_dir / "checkpoints" / f"step_{checkpoints(run_dir)[-1]:08d}"
    counted = {key: value for key, value in json.loads((folder / "state.json").read_text()).items() if key not in TIMED}
    state: dict[str, bytes | str] = {"state.json": json.dumps(counted)}
    for path in folder.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            state[f"{path.relative_to(folder)} {name}"] = tensor.numpy().tobytes()
    return state


def assert_same_run(one: Path, other: Path) -> None:
    """Asserts that all metrics of all steps and every bit of the last checkpoint are equal."""
    assert curve(one) == curve(other)
    state, expected = final_state(one), final_state(other)
    assert state.keys() == expected.keys()
    assert [name for name in state if state[name] != expected[name]] == []


def _children(pid: int) -> list[int]:
    try:
        return [
            int(child)
            for path in Path(f"/proc/{pid}/task").iterdir()
            for child in (path / "children").read_text().split()
        ]
    except OSError:
        return []
