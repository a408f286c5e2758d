"""`moe bench time_to_loss`: held-out loss against seconds of training, at equal wall-clock.

    moe bench time_to_loss                              as long as the quickstart trains, three seeds
    moe bench time_to_loss rounds=1 train.steps=40      one seed, for as long as 40 steps of the quickstart take
    moe bench time_to_loss data=files data.path=book    other data; any key of `moe train`, for all sides

A round is a seed. The quickstart runs first, and its training seconds (evaluations, saves and start-up don't count) are
what each other side gets: the number of its steps, and so its learning rate's schedule, is chosen by its seconds a step
in an earlier run. Ours are real `moe train` runs; the reference is `moe.bench.gpt`. All sides train in two processes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.bench import gpt
from moe.bench.peer import require_transformers
from moe.bench.results import Cell, Results, ResultTable
from moe.bench.settings import Rounds, counted, least_steady, load, split
from moe.config import Config
from moe.config.compose import load_config
from moe.errors import UserError

PRESET = ["experiment=quickstart", "tracking=none"]
RANKS = 2
PILOT_STEPS = 12
PARTS = 4  # evaluations of a run
LAST = 20  # steps over which MaxVio is averaged
FIRST = "quickstart"
OWN = ("run_dir", "train.seed", "train.eval_every", "train.epochs")


@dataclass(frozen=True, slots=True)
class TimedRun:
    """`module` is run under torchrun with `PRESET`, `keys` and the run's own."""

    name: str
    module: tuple[str, ...]
    keys: tuple[str, ...] = ()


def run(overrides: list[str]) -> Results:
    """The last lines are each side's validation loss. Raises UserError."""
    keys, rest = split(overrides, Rounds(rounds=3), names=("rounds",))
    for key in OWN:
        if any(one.partition("=")[0] == key for one in rest):
            raise UserError(f"bench time_to_loss {key}=…: the benchmark sets it itself")
    require_transformers("time_to_loss")
    config: Config = load_config([*PRESET, *rest])
    config.check_world(RANKS, RANKS)
    steps = config.train.steps
    if steps % PARTS:
        raise UserError(f"bench time_to_loss train.steps={steps} must be divisible by {PARTS}: it evaluates as often")
    rest = [one for one in rest if not one.startswith("train.steps=")]
    sides = sides_of(config)
    seconds_a_step = {side.name: _seconds_a_step(_rows(side, rest, PILOT_STEPS, 0)) for side in sides}
    runs: dict[str, list[list[dict[str, Any]]]] = {side.name: [] for side in sides}
    for seed in range(keys.rounds):
        budget = 0.0
        for side in sides:
            wanted = steps if side.name == FIRST else _whole_parts(budget / seconds_a_step[side.name])
            rows = _rows(side, rest, wanted, seed)
            if side.name == FIRST:
                budget = _seconds(rows)
            seconds_a_step[side.name] = _seconds_a_step(rows)
            runs[side.name].append(rows)
            print(
                f"seed {seed}, {side.name}: {wanted} steps, {_seconds(rows):.0f} s, {rows[-1]['val_loss']:.3f} nats",
                flush=True,
            )
    return results(runs, config)


def sides_of(config: Config) -> list[TimedRun]:
    """The quickstart; with Muon; dense at the same active width; in bfloat16; the reference."""
    train, width = ("moe", "train"), config.router.experts_per_token * config.model.intermediate_size
    dense = ("model.mlp=dense", f"model.intermediate_size={width}", "parallel.expert_parallel_size=1")
    return [
        TimedRun(FIRST, train),
        TimedRun("quickstart, Muon", train, ("optim=muon",)),
        TimedRun("quickstart, dense", train, dense),
        TimedRun("quickstart, bfloat16", train, ("train.precision=bfloat16",)),
        TimedRun(f"GPT-2 of transformers, {gpt.layers_of(config)} layers", ("moe.bench.gpt",)),
    ]


def results(runs: dict[str, list[list[dict[str, Any]]]], config: Config) -> Results:
    """`runs` has each side's metrics, by seed and step."""
    whole: list[list[Cell]] = []
    parts: list[list[Cell]] = []
    losses: dict[str, list[float]] = {}
    for name, seeds in runs.items():
        losses[name] = [rows[-1]["val_loss"] for rows in seeds]
        evaluated = [[row["val_loss"] for row in rows if "val_loss" in row] for rows in seeds]
        spread = statistics.stdev(losses[name]) if len(seeds) > 1 else None
        violation = [
            row["max_violation"] for rows in seeds for row in rows[-LAST:] if row.get("max_violation") is not None
        ]
        whole.append(
            [
                name,
                len(seeds[-1]),
                statistics.median(map(_seconds, seeds)),
                len(seeds[-1]) * config.train.global_batch_size * config.train.sequence_length,
                statistics.mean(losses[name]),
                spread,
                statistics.mean(violation) if violation else None,
            ]
        )
        parts.append([name, *(statistics.mean(values) for values in zip(*evaluated, strict=True))])
    columns = ["", "steps", "seconds", "tokens", "validation loss, nats", "standard deviation", "MaxVio"]
    shares = [f"{index + 1}/{PARTS}" for index in range(len(parts[0]) - 1)]
    return Results(
        [
            ResultTable(
                columns,
                whole,
                f"after equal seconds of training, {RANKS} processes, {counted(len(losses[FIRST]), 'seed')}",
            ),
            ResultTable(
                ["", *shares], parts, "validation loss after parts of its steps (before the end the rate is still high)"
            ),
        ],
        [
            "the dense model has the active width of the sparse one; the GPT has as many active parameters in its "
            f"blocks, AdamW at {gpt.LEARNING_RATE:g} and no document masks (moe/bench/gpt.py)",
            f"{load()}; {least_steady({name: [*map(_seconds_a_step, seeds)] for name, seeds in runs.items()})}",
        ],
        {f"validation loss, {name}: {{}}": statistics.mean(values) for name, values in reversed(losses.items())},
    )


def _rows(side: TimedRun, overrides: list[str], steps: int, seed: int) -> list[dict[str, Any]]:
    """A run's metrics, a dict a step. Raises UserError with the end of its output where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        own = [f"train.steps={steps}", f"train.seed={seed}", f"train.eval_every={steps // PARTS}"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m"]
        command += [*side.module, *PRESET, *side.keys, *overrides, *own, f"run_dir={folder}/run"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"bench time_to_loss, {side.name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        with (Path(folder) / "run" / "metrics.jsonl").open() as file:
            rows = [json.loads(line) for line in file]
    if skipped := rows[-1].get("skipped_steps"):  # the reference skips none
        raise UserError(f"bench time_to_loss, {side.name}: {counted(skipped, 'step')} of {steps} skipped (seed {seed})")
    return rows


def _whole_parts(steps: float) -> int:
    """The nearest number of steps that is divisible by PARTS, so that each side is evaluated after the same shares."""
    return PARTS * max(1, round(steps / PARTS))


def _seconds(rows: list[dict[str, Any]]) -> float:
    return sum(row["step_seconds"] for row in rows)


def _seconds_a_step(rows: list[dict[str, Any]]) -> float:
    return statistics.median(row["step_seconds"] for row in rows)
