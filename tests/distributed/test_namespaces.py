"""Two nodes in two network namespaces: the curve equals one process's; a slow link, a killed rank, a clean stop."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe.checkpoint.layout import committed
from tests.e2e.conftest import SMALL, allowed_by_tie, command, environment, read_metrics, tied_step

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
OVERRIDES = [*SMALL, f"train.steps={STEPS}", "checkpoint.every=4"]


def _missing() -> str | None:
    """Why network namespaces can't be made here; None if they can."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "no ip or tc here (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"moe-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"ip netns add: {made.stderr.strip()}"
    link = ["ip", "link", "add", "moe0", "netns", name, "type", "veth", "peer", "name", "moe1", "netns", name]
    linked = subprocess.run(link, capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None if linked.returncode == 0 else f"ip link add … veth: {linked.stderr.strip()}"


@pytest.fixture(scope="module", autouse=True)
def _skip_without_namespaces() -> None:
    reason = _missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def name() -> str:
    return f"moe-test-{os.getpid()}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpus")
    lines = (f"{a} plus {b} makes {a + b}, and {a} times {b} makes {a * b}.\n" for a in range(40) for b in range(25))
    (folder / "text.txt").write_text("\n".join(lines))
    cache = tmp_path_factory.mktemp("cache")
    return ["data=files", f"data.path={folder}", "data.held_out=0.2", f"data.cache_dir={cache}"]


@pytest.fixture(scope="module")
def single(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """The metrics of the run in one process."""
    run = tmp_path_factory.mktemp("single")
    overrides = ("train", f"run_dir={run}", *OVERRIDES, *data)
    done = subprocess.run(
        command(overrides), env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return read_metrics(run)


def _start(name: str, logs: Path, *overrides: str, verb: str = "train", **more: str) -> subprocess.Popen[str]:
    env = environment({"NAME": name, "LOGS": str(logs), "VENV": str(Path(sys.executable).parent.parent), **more})
    script = ["bash", str(ROOT / "launch/two_namespaces.sh"), verb, *overrides]
    return subprocess.Popen(script, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(process: subprocess.Popen[str], timeout: float = 150) -> str:
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # the script then removes its namespaces
        output, _ = process.communicate(timeout=30)
        raise AssertionError(f"hung for {timeout} s:\n{output}") from None
    return output


def _namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line]


def _same_curve(run: Path, single: list[dict[str, object]]) -> None:
    metrics = read_metrics(run)
    assert len(metrics) == STEPS
    tied = tied_step(metrics, single)
    for here, there in zip(metrics, single, strict=True):
        for key in ("step", "tokens", "loss", "lm_loss", "load_balancing_loss", "router_z_loss"):
            absolute = allowed_by_tie(key) if here["step"] == tied else None
            same = pytest.approx(there[key], rel=1e-6, abs=absolute)
            assert here[key] == same, f"{key} at step {there['step']}"


def test_experts_split_over_two_nodes_give_the_curve_of_one_process(
    name: str, data: list[str], single: list[dict[str, object]], tmp_path: Path
) -> None:
    split = ["parallel.expert_parallel_size=2", "parallel.expert_across_nodes=true", f"run_dir={tmp_path / 'run'}"]
    process = _start(name, tmp_path / "logs", *OVERRIDES, *data, *split)
    output = _finish(process)
    assert process.returncode == 0, output
    assert "node 0 | ranks: 2, expert-parallel size 2" in output
    assert "node 1 | launch/torchrun.sh: node 1 of 2 meets the others at 10.77.0.1:29500" in output
    assert "step 1/" not in (tmp_path / "logs/node_1.log").read_text(), "only rank 0 prints"
    _same_curve(tmp_path / "run", single)
    assert not [found for found in _namespaces() if found.startswith(name)]


def test_a_killed_rank_restarts_both_nodes_and_the_curve_is_the_same(
    name: str, data: list[str], single: list[dict[str, object]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = _start(
        name,
        tmp_path / "logs",
        *OVERRIDES,
        *data,
        "parallel.expert_parallel_size=1",
        f"run_dir={run}",
        MAX_RESTARTS="1",
        RATE="10mbit",
    )
    deadline = time.monotonic() + 100
    while not committed(run / "checkpoints"):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    _kill_rank(f"{name}-b")
    output = _finish(process)
    assert process.returncode == 0, output
    assert "node 0 | resuming from" in output
    _same_curve(run, single)


def _pids(namespace: str) -> list[str]:
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True)
    return listed.stdout.split()


def _kill_rank(namespace: str) -> None:
    """SIGKILL to the ranks in a namespace: the processes that torchrun started there."""
    ranks = [pid for pid in _pids(namespace) if b"TORCHELASTIC_RUN_ID=" in Path(f"/proc/{pid}/environ").read_bytes()]
    assert ranks, f"no rank in {namespace}"
    for pid in ranks:
        os.kill(int(pid), signal.SIGKILL)


def test_the_links_rate_limits_the_step(name: str, data: list[str], tmp_path: Path) -> None:
    """A step sends at least the weights' bytes in each direction, which takes 0.3 s at this rate."""
    run = tmp_path / "run"
    parameters = 76_000
    rate = 4 * parameters * 8 / 0.3
    overrides = [*OVERRIDES, *data, "train.steps=6", "train.eval_every=100", "train.sample_every=100", f"run_dir={run}"]
    process = _start(name, tmp_path / "logs", *overrides, RATE=f"{rate:.0f}bit")
    output = _finish(process)
    assert process.returncode == 0, output
    seconds = sum(line["step_seconds"] for line in read_metrics(run)[1:])  # type: ignore[misc]
    burst = 256 * 1024 * 8 / rate  # seconds saved by the burst that tbf lets through at once
    assert seconds > 5 * 0.3 - burst, f"5 steps took {seconds} s at {rate:.0f} bit/s"
    assert seconds < 60
    assert int(re.findall(r"link: node 0 sent (\d+) bytes", output)[0]) > 6 * 4 * parameters


def test_no_collective_is_found_faster_than_the_link(name: str, tmp_path: Path) -> None:
    shape = ["model.vocab_size=320", "model.hidden_size=32", "model.num_hidden_layers=1", "tokenizer.vocab_size=300"]
    overrides = ["scale", "rate=200mbit", "rounds=1", "parallel.expert_across_nodes=true", *shape]
    process = _start(name, tmp_path / "logs", *overrides, verb="bench", RATE="200mbit")
    output = _finish(process)
    assert process.returncode == 0, output
    assert len(re.findall(r"all-(?:reduce|to-all)'s bandwidth ÷ the link's rate \d", output)) == 2, output
    calls = re.findall(r"\| all-(?:reduce|to-all) +([\d,]{9,}) +([\d,.]+) ", output)  # of a megabyte or more
    assert len(calls) == 6, output
    for size, milliseconds in (map(_number, call) for call in calls):
        passed = 256 * 1024 / 2  # bytes of a call that pass at once: the burst, over two calls
        assert milliseconds > 0.95e3 * (size - passed) / 25e6, output


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def test_a_signal_leaves_nothing_behind(name: str, data: list[str], tmp_path: Path) -> None:
    process = _start(name, tmp_path / "logs", *OVERRIDES, *data, "train.steps=100000", f"run_dir={tmp_path / 'run'}")
    deadline = time.monotonic() + 90
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pids = [pid for node in "ab" for pid in _pids(f"{name}-{node}")]
    assert len(pids) >= 4, "a torchrun and a rank on each node"
    process.terminate()
    _finish(process, timeout=30)
    assert process.returncode == 143
    assert not [found for found in _namespaces() if found.startswith(name)]
    deadline = time.monotonic() + 20  # a killed process takes a moment to disappear
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@pytest.mark.parametrize(("more", "message"), [({"RATE": "fast"}, "RATE=fast: tc doesn't know that rate")])
def test_a_wrong_rate_ends_at_once(
    name: str, data: list[str], tmp_path: Path, more: dict[str, str], message: str
) -> None:
    process = _start(name, tmp_path / "logs", *OVERRIDES, *data, f"run_dir={tmp_path / 'run'}", **more)
    output = _finish(process, timeout=30)
    assert process.returncode == 2
    assert message in output
    assert not [found for found in _namespaces() if found.startswith(name)]
