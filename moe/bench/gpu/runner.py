"""Runs the stages one after another, each in its own process, and writes report.json and summary.md after each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.bench.gpu.record import nothing, write_atomically
from moe.bench.gpu.render import summary
from moe.bench.gpu.requirements import judged
from moe.bench.gpu.settings import Settings

LOG_CHARACTERS = 1_000_000  # the end of a stage's output that log.txt keeps
ERROR_LINES = 15  # the end of a failed stage's output that the report shows
KILL_SECONDS = 5.0  # from SIGABRT, which prints the stage's stacks, to SIGKILL
PROBE_SECONDS = 120.0  # the first import of torch on a machine reads gigabytes


@dataclass(frozen=True, slots=True)
class Stage:
    """`module` (default: the one in moe/bench/gpu named `name`) has `run(settings, record)`; `seconds` is its limit."""

    name: str
    seconds: float
    about: str
    module: str = ""

    @property
    def source(self) -> str:
        return self.module or f"moe.bench.gpu.{self.name}"


# The most wanted results first. A limit is about twice the time expected. The limits may add up to more than the whole
# report's time: a stage gets what is left of it, and is skipped if that is less than half its limit.
STAGES = [
    Stage("machine", 60, "versions and peaks"),
    Stage("layer", 80, "the Mixtral layer by expert back-end"),
    Stage("step", 100, "a training step of 3 B parameters"),
    Stage("peers", 100, "a training step beside transformers'"),
    Stage("memory", 80, "Mixtral 8x7B's planned and measured memory"),
    Stage("cuda_tests", 120, "tests that need a GPU"),
    Stage("training", 120, "bf16 training, checkpoint, resume"),
    Stage("kernels", 50, "Triton's kernels beside plain PyTorch"),
    Stage("attention", 50, "attention by back-end"),
    Stage("profiler", 70, "where that step's time goes"),
    Stage("offload", 70, "optimizer in the host's memory"),
    Stage("flex", 100, "flex attention"),
]


def run_report(stages: list[Stage], settings: Settings, seconds: float) -> bool:
    """Runs the stages within `seconds`; returns whether all of them passed.

    Without a GPU, unless `dry_run`, it prints that, runs nothing and returns True.
    """
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `finally` ends the stage too
    environment = _environment(settings)
    if not settings.dry_run and not _has_gpu(environment):
        print("no GPU here: nothing was measured (a dry run takes every stage on the CPU)")
        return True
    report: dict[str, Any] = {
        "version": 2,
        "dry_run": settings.dry_run,
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "seconds": 0.0,
        "requirements": [],
        "stages": {},
    }
    (settings.out / "log.txt").write_text("", encoding="utf-8")
    for stage in stages:
        rest = seconds - (time.monotonic() - started)
        limit = min(stage.seconds, rest - KILL_SECONDS)
        print(f"{stage.name}: {stage.about} (at most {max(limit, 0):.0f} s of {max(rest, 0):.0f} s left)", flush=True)
        if limit < stage.seconds / 2:
            result = _result("skipped", 0.0, [f"half its limit of {stage.seconds:.0f} s is over the {rest:.0f} s left"])
        else:
            result = _run_stage(stage, limit, settings, environment)
        report["stages"][stage.name] = {"about": stage.about, "limit": stage.seconds} | result
        report["requirements"] = judged(report["stages"])
        report["seconds"] = round(time.monotonic() - started, 1)
        write_atomically(settings.out / "report.json", json.dumps(report, indent=1) + "\n")
        write_atomically(settings.out / "summary.md", summary(report))
        print(f"{stage.name}: {result['state']} in {result['seconds']:.0f} s; {result['headline']}", flush=True)
        for line in result["error"]:
            print(f"    {line}", flush=True)
    print(summary(report))
    return all(result["state"] == "passed" for result in report["stages"].values())


def _environment(settings: Settings) -> dict[str, str]:
    """The stages' environment: one machine without a network, and in a dry run without a GPU."""
    environment = dict(os.environ)
    environment |= {
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    root = str(Path(__file__).resolve().parents[3])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), root)))
    if settings.dry_run:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    else:
        environment.pop("DS_ACCELERATOR", None)
    return environment


def _has_gpu(environment: dict[str, str]) -> bool:
    """Asks in a process of its own, since a CUDA context in this one would take memory from the stages. Raises
    RuntimeError if torch can't be imported."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"torch can't be imported with {sys.executable}:\n{done.stderr}")
    return done.stdout.split()[-1] == "True"


def _run_stage(stage: Stage, limit: float, settings: Settings, environment: dict[str, str]) -> dict[str, Any]:
    """The stage's results and its state: passed, failed, or timed out after `limit` seconds."""
    work = Path(settings.work)
    recorded, log = work / f"{stage.name}.json", work / f"{stage.name}.log"
    command = [sys.executable, "-m", "moe.bench.gpu.stage", stage.source, str(recorded)]
    command += ["true" if settings.dry_run else "false", str(settings.out), settings.folder, settings.work]
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        timed_out = False
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            end(process)
    seconds = time.monotonic() - started
    text = log.read_text(encoding="utf-8", errors="replace")
    with (settings.out / "log.txt").open("a", encoding="utf-8") as file:
        file.write(f"===== {stage.name}, {seconds:.1f} s\n{text[-LOG_CHARACTERS:]}\n")
    values = json.loads(recorded.read_text(encoding="utf-8")) if recorded.exists() else {}
    wrong = [
        f"{check['name']}: {check['value']} must be ≤ {check['limit']}"
        for check in values.get("checks", [])
        if not check["passed"]
    ]
    lines = [line for line in text.splitlines() if line.strip()]
    if timed_out:
        error = [f"no end within {limit:.0f} s", *_stacks(lines)]
        return _result("timed out", seconds, error, values)
    if process.returncode:
        return _result("failed", seconds, [f"exit code {process.returncode}", *lines[-ERROR_LINES:]], values)
    return _result("failed" if wrong else "passed", seconds, wrong, values)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and every process that it started, all in one process group of its own."""
    if process.poll() is None:
        process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=KILL_SECONDS)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # no process is left
        return
    process.wait()


def _stacks(lines: list[str]) -> list[str]:
    """The first lines of the last stacks that faulthandler wrote, innermost frames first; else the output's end."""
    fatal = [index for index, line in enumerate(lines) if line.startswith("Fatal Python error")]
    return lines[fatal[-1] : fatal[-1] + ERROR_LINES] if fatal else lines[-ERROR_LINES:]


def _result(state: str, seconds: float, error: list[str], values: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"state": state, "seconds": round(seconds, 1), "error": error} | nothing() | (values or {})
