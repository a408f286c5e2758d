"""`moe bench startup`: from `moe train` to its first step, with prepared shards, and what a mistake's answer costs.

    moe bench startup                              model=tiny, on the text that comes with Python
    moe bench startup rounds=9 engine=plain        any key of `moe train`

Each round starts every command once, in a process of its own, in alternating order; an earlier round, which isn't
counted, reads the files into memory. The first step's time is that of its row in metrics.jsonl; the run is then ended.
CPU seconds are those of all threads of a process, and the least of the rounds is the figure: other programs only add to
it. Shards and run directories are in a temporary folder, which is removed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from resource import RUSAGE_CHILDREN

from moe.bench.gpu.runner import end
from moe.bench.prepare import cpu_seconds
from moe.bench.results import Cell, Results, ResultTable
from moe.bench.settings import Rounds, counted, least_steady, load, split
from moe.config import Config
from moe.config.compose import load_config
from moe.data.prepare import prepare
from moe.distributed.environment import world_from_environment
from moe.errors import UserError

PRESET = ["model=tiny", "tracking=none"]
OWN = ("run_dir", "data.cache_dir")
LIMIT = 300.0  # seconds until a first step
POLLED = 0.005  # seconds between two looks at metrics.jsonl
FIRST_STEP = "first step of moe train"


@dataclass(frozen=True, slots=True)
class Answer:
    """A command that ends at once, with `code` and `says` in its output."""

    name: str
    words: tuple[str, ...]
    code: int
    says: str


ANSWERS = (
    Answer("a misspelt key", ("train", "model.hiden_size=3"), 2, "model.hiden_size=3: no such key"),
    Answer("a broken rule", ("train", "router.top_k=9"), 2, "router.top_k=9 must be"),
    Answer("help", ("--help",), 0, "moe train"),
)


@dataclass(slots=True)
class Starts:
    """Of each round: seconds from the start to the first step or the answer, and CPU seconds."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def run(overrides: list[str]) -> Results:
    """A row for each command; the last line is `first step after N.NN s`. Raises UserError."""
    keys, rest = parse(overrides)
    if world_from_environment()[1] != 1:
        raise UserError("bench startup starts its own processes: start it without torchrun")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = [*PRESET, *rest, f"data.cache_dir={folder / 'cache'}"]
        config: Config = load_config(given)
        prepare(config.data, config.tokenizer, sequence_length=config.train.sequence_length, log=print)
        starts = measure(keys.rounds, given, folder)
    return results(starts)


def parse(overrides: list[str]) -> tuple[Rounds, list[str]]:
    """`rounds=` and the checked overrides of `moe train`. Raises UserError."""
    keys, rest = split(overrides, Rounds(rounds=5), names=("rounds",))
    for override in rest:
        if override.partition("=")[0] in OWN:
            raise UserError(f"bench startup {override}: it sets {' and '.join(OWN)} itself")
    config: Config = load_config([*PRESET, *rest])
    config.check_world(1)
    return keys, rest


def measure(rounds: int, overrides: list[str], folder: Path) -> dict[str, Starts]:
    """{command: its starts}; run directories are made in `folder`. Raises UserError where a command did something else
    than it should."""
    starts = {name: Starts() for name in (FIRST_STEP, *(each.name for each in ANSWERS))}
    by_name = {each.name: each for each in ANSWERS}
    for index in range(rounds + 1):
        for name in list(starts)[:: -1 if index % 2 else 1]:
            if name == FIRST_STEP:
                seconds, cpu = first_step([*overrides, f"run_dir={folder / f'run-{index}'}"], folder)
            else:
                seconds, cpu = answered(by_name[name], folder)
            if index:  # the first round warms up
                starts[name].seconds.append(seconds)
                starts[name].cpu.append(cpu)
    return starts


def first_step(overrides: list[str], folder: Path) -> tuple[float, float]:
    """Seconds to the end of the first step of a run, whose `run_dir` is the last override, and the run's CPU seconds
    until it was ended."""
    metrics, log = Path(overrides[-1].removeprefix("run_dir=")) / "metrics.jsonl", folder / "log"
    before, began, limit = cpu_seconds(RUSAGE_CHILDREN), time.time(), time.monotonic() + LIMIT
    process = _started(("train", *overrides), log)
    try:
        while not (lines := _read(metrics).splitlines(keepends=True)) or not lines[0].endswith("\n"):
            if process.poll() is not None or time.monotonic() > limit:
                raise UserError(f"bench startup: moe train took no first step:\n{_read(log)[-2000:]}")
            time.sleep(POLLED)
    finally:
        process.kill()  # not to save: `end` alone asks for a stack first
        end(process)
    row = json.loads(lines[0])
    if row["skipped_steps"]:
        raise UserError("bench startup: the first step was skipped: its time would say nothing")
    return row["time"] - began, cpu_seconds(RUSAGE_CHILDREN) - before


def answered(answer: Answer, folder: Path) -> tuple[float, float]:
    """Seconds until the command ended, and its CPU seconds."""
    log = folder / "log"
    before, start = cpu_seconds(RUSAGE_CHILDREN), time.perf_counter()
    process = _started(answer.words, log)
    try:
        code = process.wait(timeout=LIMIT)
    finally:
        end(process)
    measured = time.perf_counter() - start, cpu_seconds(RUSAGE_CHILDREN) - before
    if code != answer.code or answer.says not in (said := _read(log)):
        raise UserError(f"bench startup: moe {' '.join(answer.words)} ended with {code}:\n{said[-2000:]}")
    return measured


def _started(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        command = [sys.executable, "-m", "moe", *words]
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)


def _read(path: Path) -> str:
    """ "" where there is no file yet."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def results(starts: dict[str, Starts]) -> Results:
    rows: list[list[Cell]] = [
        [name, statistics.median(each.seconds), min(each.seconds), max(each.seconds), min(each.cpu)]
        for name, each in starts.items()
    ]
    rounds = len(starts[FIRST_STEP].seconds)
    return Results(
        [ResultTable(["", "seconds", "least", "most", "CPU seconds, least"], rows)],
        [
            f"medians of {counted(rounds, 'alternating round')}, {load()}; seconds are wall-clock",
            least_steady({name: each.seconds for name, each in starts.items()}),
        ],
        {
            **{f"{each.name} answered in {{}} s of CPU time": min(starts[each.name].cpu) for each in reversed(ANSWERS)},
            "first step after {} s": statistics.median(starts[FIRST_STEP].seconds),
        },
    )
