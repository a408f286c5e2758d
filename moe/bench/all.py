"""`moe bench all`: every benchmark of the CPU, each in a process of its own, and the measured part of a page.

    moe bench all                                    one to two hours; best on a machine that does nothing else
    moe bench all only=peers,decode                  some of them; the others' results stay if they are of this machine
    moe bench all rounds=1 steps=1                   quick, and noisy
    moe bench all page=page.md json=results.json     other files than docs/performance.md and docs/performance.json

The page, between two markers that it must have, and its plot (images/performance.svg beside it, by the page's name) are
written from the JSON alone, all three after each benchmark. A benchmark that fails is named in the page and the others
run; the exit code is then 1.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe.bench import BENCHMARKS
from moe.bench.gpu.runner import ERROR_LINES, end
from moe.bench.report import BEGIN, END, code_version, image_of, machine, new_report, read_report, write_report
from moe.bench.settings import Rounds, split
from moe.distributed.environment import world_from_environment
from moe.durable import check_section
from moe.errors import UserError
from moe.untrusted import read_json

LIMIT = 3600  # seconds of one benchmark


@dataclass(frozen=True, slots=True)
class BenchRun:
    """`takes` are the keys of `Rounds` that the benchmark has."""

    name: str
    keys: tuple[str, ...] = ()
    threads: int = 1
    ranks: int = 1
    takes: tuple[str, ...] = ("rounds", "steps")

    @property
    def title(self) -> str:
        ranks = f"{self.ranks} ranks of " if self.ranks > 1 else ""
        keys = (key for key in self.keys if key.partition("=")[0] not in Rounds.__slots__)
        return ", ".join((self.name, *keys, f"{ranks}{self.threads} thread{'s' * (self.threads > 1)}"))

    def command(self, more: list[str]) -> list[str]:
        """Without its environment; the keys in `more` take the place of its own."""
        program = ["torchrun", "--nproc-per-node", str(self.ranks), "-m", "moe"] if self.ranks > 1 else ["moe"]
        stated = {key.partition("=")[0] for key in more}
        own = [key for key in self.keys if key.partition("=")[0] not in stated]
        return [*program, "bench", self.name, *own, *more]


BFLOAT16 = "precision=bfloat16"
LONG = (
    "train.sequence_length=8192",
    "train.micro_batch_size=1",
    "train.global_batch_size=1",
    "model.sliding_window=512",
)
RUNS = (
    BenchRun("roofline", takes=("rounds",)),
    BenchRun("roofline", threads=2, takes=("rounds",)),
    *(BenchRun("peers", keys, threads) for keys in ((), (BFLOAT16,)) for threads in (1, 2)),
    *(BenchRun("threads", keys, 2) for keys in ((), (BFLOAT16,))),
    *(BenchRun("memory_peers", ("rounds=3", *keys)) for keys in ((), (BFLOAT16,))),
    *(BenchRun(name, ("rounds=1", *LONG)) for name in ("peers", "memory_peers")),
    *(BenchRun("decode", threads=threads) for threads in (1, 2)),
    *(BenchRun("kernels", keys, takes=("rounds",)) for keys in ((), (BFLOAT16,))),
    *(BenchRun("step", keys, takes=("rounds",)) for keys in ((), (BFLOAT16,))),
    BenchRun("attention", takes=()),
    BenchRun("scale"),
    BenchRun("scale", ranks=2),
    BenchRun("expert_parallel", ranks=2),
    *(BenchRun("exchange", keys, ranks=2) for keys in ((), (BFLOAT16,))),
    BenchRun("diagnostics"),
    BenchRun("startup", takes=("rounds",)),
    BenchRun("saving", ("rounds=3",)),
    BenchRun("prepare", takes=("rounds",)),
    BenchRun("memory", takes=()),
    BenchRun("time_to_loss", takes=("rounds",)),
)


@dataclass(frozen=True, slots=True)
class ReportKeys:
    only: list[str] = field(default_factory=list)
    page: Path = Path("docs/performance.md")
    json: Path = Path("docs/performance.json")
    rounds: dict[str, int] = field(default_factory=dict)  # the keys of `Rounds` that are stated


def run(overrides: list[str]) -> None:
    """Raises UserError, and SystemExit(1) where a benchmark failed."""
    keys = parse(overrides)
    if world_from_environment()[1] != 1:
        raise UserError("bench all starts its own processes: start it without torchrun")
    if not keys.json.absolute().parent.is_dir() or keys.json.is_dir():
        raise UserError(f"json={keys.json} must be a file in a folder that exists")
    check_section(keys.page, BEGIN, END)
    image = image_of(keys.page)
    report = new_report()
    if keys.only and keys.json.exists():
        before = read_report(keys.json)
        if before["machine"] == machine():
            report = before
        else:
            print(f"{keys.json}: its results are of another machine or other versions, and are left out")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `finally` ends the benchmark
    failed = []
    for each in RUNS:
        if keys.only and each.name not in keys.only:
            continue
        more = [f"{name}={value}" for name, value in keys.rounds.items() if name in each.takes]
        command = f"OMP_NUM_THREADS={each.threads} {shlex.join(each.command(more))}"
        print(f"{command}: {BENCHMARKS[each.name]}", flush=True)
        result = _measured(each, more)
        others = {known: one for known, one in report["benchmarks"].items() if one["title"] != each.title}
        report["benchmarks"] = in_order(others | {command: result})
        write_report(report, keys.json, keys.page)
        print(
            f"{each.title}: {result['state']} in {result['seconds']:.0f} s", *result["error"], sep="\n    ", flush=True
        )
        if result["state"] == "failed":
            failed.append(each.title)
    print(f"{keys.page}, {image}, {keys.json}: {len(report['benchmarks'])} results")
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


def in_order(benchmarks: dict[str, Any]) -> dict[str, Any]:
    """A report's benchmarks in the order of RUNS."""
    titles = {each.title: place for place, each in enumerate(RUNS)}
    return dict(sorted(benchmarks.items(), key=lambda one: titles.get(one[1]["title"], len(titles))))


def parse(overrides: list[str]) -> ReportKeys:
    """Raises UserError."""
    _, rest = split(overrides)
    rounds = [one.partition("=") for one in overrides if one.partition("=")[0] in Rounds.__slots__]
    stated: dict[str, Any] = {"rounds": {name: int(value) for name, _, value in rounds}}
    names = list(dict.fromkeys(each.name for each in RUNS))
    for override in rest:
        key, _, value = override.partition("=")
        if key not in ("only", "page", "json") or not value:
            raise UserError(f"bench all {override}: its keys are only, page, json, rounds, steps, each with a value")
        stated[key] = value.split(",") if key == "only" else Path(value)
    keys = ReportKeys(**stated)
    for name in keys.only:
        if name not in names:
            raise UserError(f"only={','.join(keys.only)}: {name} is none of {', '.join(names)}")
    return keys


def _measured(each: BenchRun, more: list[str]) -> dict[str, Any]:
    """Runs one benchmark and returns its entry in the report."""
    started, began = time.strftime("%Y-%m-%d %H:%M", time.gmtime()), time.monotonic()
    entry: dict[str, Any] = {
        "title": each.title,
        "about": BENCHMARKS[each.name],
        "started": started,
        "code": code_version(),
    }
    entry |= {"load": round(os.getloadavg()[0], 1), "results": None, "error": []}
    cores = len(os.sched_getaffinity(0))
    if each.threads * each.ranks > cores:
        needs = f"needs {each.threads * each.ranks} cores, and {cores} can be used"
        return entry | {"state": "left out", "seconds": 0.0, "error": [needs]}
    with tempfile.TemporaryDirectory() as name:
        file, log = Path(name) / "results.json", Path(name) / "log"
        code = _run(each.command([*more, f"json={file}"]), each.threads, log)
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        if code == 0:
            entry |= {"results": read_json(file)}
        else:
            why = f"no end within {LIMIT} s" if code is None else f"exit code {code}"
            entry |= {"error": [*lines[-ERROR_LINES:], why]}
    state = "failed" if entry["error"] else "measured"
    return entry | {"state": state, "seconds": round(time.monotonic() - began, 1)}


def _run(command: list[str], threads: int, log: Path) -> int | None:
    """The exit code; None where it was ended after `LIMIT` seconds."""
    program = [sys.executable, "-m", *(["torch.distributed.run"] if command[0] == "torchrun" else ["moe"])]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*program, *command[1:]], env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return process.wait(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)
