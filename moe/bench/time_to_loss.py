"""`moe bench time_to_loss`: held-out loss against seconds of training, at equal wall-clock.

    moe bench time_to_loss                              as long as the quickstart trains, three seeds
    moe bench time_to_loss rounds=1 train.steps=40      one seed, for as long as 40 steps of the quickstart take
    moe bench time_to_loss sides=quickstart,muon        some of the sides: quickstart, muon, dense, bfloat16, gpt
    moe bench time_to_loss sides=quickstart,router=lossfree,router=deepseek_v3
                                                        or the quickstart with a preset, or a key, of `moe train`
    moe bench time_to_loss "sides=quickstart,train.micro_batch_size=4 train.global_batch_size=8"
                                                        or with several, a blank between them
    moe bench time_to_loss data=files data.path=book    other data; any key of `moe train`, for all sides

A round is a seed. The first side trains for `train.steps` steps, and its training seconds (evaluations, saves and
start-up don't count) are what each other side gets: the number of its steps, and so its learning rate's schedule, is
chosen by its seconds a step in an earlier run. Ours are real `moe train` runs; the reference, `gpt`, is
`moe.bench.gpt`. All sides train in two processes.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe.bench import gpt
from moe.bench.peer import require_transformers
from moe.bench.results import SECONDS, Cell, Results, ResultTable
from moe.bench.settings import Rounds, counted, least_steady, load, split
from moe.config import Config
from moe.config.choices import Packing
from moe.config.compose import load_config
from moe.errors import UserError

PRESET = ["experiment=quickstart", "tracking=none"]
RANKS = 2
PILOT_STEPS = 12
EVALUATIONS = 24  # of a run, about
PARTS = 8  # of the longest run's seconds: the rows of the table
LAST = 20  # steps over which MaxVio is averaged
SIDES = ("quickstart", "muon", "dense", "bfloat16", "gpt")
OWN = ("run_dir", "train.seed", "train.eval_every", "train.epochs")


@dataclass(frozen=True, slots=True)
class TimedRun:
    """`module` is run under torchrun with `PRESET`, all sides' keys, `keys` and the run's own."""

    name: str
    module: tuple[str, ...]
    keys: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class LossRuns:
    """`config` and `overrides` are all sides'; `overrides` lacks the first side's steps, `config.train.steps`."""

    rounds: int
    sides: list[TimedRun]
    config: Config
    overrides: list[str]


def parse(overrides: list[str]) -> LossRuns:
    """Raises UserError."""
    keys, rest = split(overrides, Rounds(rounds=3), names=("rounds",))
    names = [one.removeprefix("sides=") for one in rest if one.startswith("sides=")]
    rest = [one for one in rest if not one.startswith("sides=")]
    for key in OWN:
        if any(one.partition("=")[0] == key for one in rest):
            raise UserError(f"bench time_to_loss {key}=…: the benchmark sets it itself")
    config: Config = load_config([*PRESET, *rest])
    config.check_world(RANKS, RANKS)
    sides = sides_of(config, names[-1].split(",") if names else list(SIDES))
    for side in sides:
        _check(side, config, rest)
    return LossRuns(keys.rounds, sides, config, [one for one in rest if not one.startswith("train.steps=")])


def sides_of(config: Config, names: list[str]) -> list[TimedRun]:
    """The quickstart; with Muon; dense at the same active width; in bfloat16; the reference; and, of a name with `=`,
    the quickstart with that preset or key, or those between blanks. Raises UserError."""
    train, width = ("moe", "train"), config.router.experts_per_token * config.model.intermediate_size
    dense = ("model.mlp=dense", f"model.intermediate_size={width}", "parallel.expert_parallel_size=1")
    known = {
        "quickstart": TimedRun("quickstart", train),
        "muon": TimedRun("quickstart, Muon", train, ("optim=muon",)),
        "dense": TimedRun("quickstart, dense", train, dense, "the dense model has the active width of the sparse one"),
        "bfloat16": TimedRun("quickstart, bfloat16", train, ("train.precision=bfloat16",)),
        "gpt": TimedRun(
            f"GPT-2 of transformers, {gpt.layers_of(config)} layers",
            ("moe.bench.gpt",),
            note="the GPT has as many active parameters in its blocks as the quickstart's model, AdamW at "
            f"{gpt.LEARNING_RATE:g} and no document masks (moe/bench/gpt.py)",
        ),
    }
    for name in names:
        if name not in known and not (name and all("=" in key for key in name.split(" "))):
            raise UserError(
                f"sides={','.join(names)}: {name} is none of {', '.join(known)}, nor presets or keys of `moe train` "
                "with their values, such as router=lossfree"
            )
        if names.count(name) > 1:
            raise UserError(f"sides={','.join(names)} names {name} twice")
    return [known.get(name) or TimedRun(f"quickstart, {name}", train, tuple(name.split(" "))) for name in names]


def _check(side: TimedRun, config: Config, overrides: list[str]) -> None:
    """Raises UserError for a side that can't run, and for one whose loss could not be compared."""
    for key in side.keys:
        if key.partition("=")[0] in (*OWN, "train.steps"):
            raise UserError(f"sides=…{key}: the benchmark sets it itself")
    own: Config = load_config([*PRESET, *overrides, *side.keys])
    own.check_world(RANKS, RANKS)
    if _held_out(own) != _held_out(config):
        raise UserError(f"sides=…{' '.join(side.keys)} changes the held-out tokens, so its loss can't be compared")


def _held_out(config: Config) -> list[Any]:
    """What a loss in nats per token depends on beside the model. Held-out documents are packed and masked alike
    whatever the keys say."""
    train = config.train
    data = replace(config.data, packing=Packing.concat, document_mask=True)
    return [data, config.tokenizer, config.model.vocab_size, train.sequence_length, train.eval_sequences]


def run(overrides: list[str]) -> Results:
    """The last lines are each side's validation loss. Raises UserError."""
    keys = parse(overrides)
    require_transformers("time_to_loss")
    first, rest = keys.sides[0], keys.overrides
    pilots = {side.name: _rows(side, rest, PILOT_STEPS, seed=0, evaluations=1) for side in keys.sides}
    seconds_a_step = {name: _seconds_a_step(rows) for name, rows in pilots.items()}
    runs: dict[str, list[list[dict[str, Any]]]] = {side.name: [] for side in keys.sides}
    for seed in range(keys.rounds):
        budget = 0.0
        for side in keys.sides:
            steps = keys.config.train.steps if side is first else max(1, round(budget / seconds_a_step[side.name]))
            rows = _rows(side, rest, steps, seed, EVALUATIONS)
            if side is first:
                budget = _seconds(rows)
            seconds_a_step[side.name] = _seconds_a_step(rows)
            runs[side.name].append(rows)
            print(
                f"seed {seed}, {side.name}: {steps} steps, {_seconds(rows):.0f} s, {rows[-1]['val_loss']:.3f} nats",
                flush=True,
            )
    return results(runs, [side.note for side in keys.sides if side.note])


def results(runs: dict[str, list[list[dict[str, Any]]]], notes: list[str]) -> Results:
    """`runs` has each side's metrics, by seed and step."""
    whole: list[list[Cell]] = []
    losses: dict[str, list[float]] = {}
    for name, seeds in runs.items():
        losses[name] = [rows[-1]["val_loss"] for rows in seeds]
        spread = statistics.stdev(losses[name]) if len(seeds) > 1 else None
        violation = [
            row["max_violation"] for rows in seeds for row in rows[-LAST:] if row.get("max_violation") is not None
        ]
        whole.append(
            [
                name,
                len(seeds[-1]),
                statistics.median(map(_seconds, seeds)),
                seeds[-1][-1]["tokens"],
                statistics.mean(losses[name]),
                spread,
                statistics.mean(violation) if violation else None,
            ]
        )
    columns = ["", "steps", "seconds", "tokens", "validation loss, nats", "standard deviation", "MaxVio"]
    seeds = counted(len(next(iter(losses.values()))), "seed")
    return Results(
        [
            ResultTable(columns, whole, f"after equal seconds of training, {RANKS} processes, {seeds}"),
            against_seconds(runs),
        ],
        [
            *notes,
            f"a loss after so many seconds is that of the last evaluation before, of about {EVALUATIONS}; a side that "
            "has ended keeps its last; before a side's end its learning rate is still high",
            f"{load()}; {least_steady({name: [*map(_seconds_a_step, seeds)] for name, seeds in runs.items()})}",
        ],
        {f"validation loss, {name}: {{}}": statistics.mean(values) for name, values in reversed(losses.items())},
    )


def against_seconds(runs: dict[str, list[list[dict[str, Any]]]]) -> ResultTable:
    """Each side's mean loss over its seeds after the same seconds, up to the longest run's end; None where a seed has
    no evaluation yet."""
    longest = max(_seconds(rows) for seeds in runs.values() for rows in seeds)
    table: list[list[Cell]] = []
    for part in range(1, PARTS + 1):
        seconds = longest * part / PARTS
        row: list[Cell] = [seconds]
        for seeds in runs.values():
            values = [loss_at(rows, seconds) for rows in seeds]
            known = [value for value in values if value is not None]
            row.append(statistics.mean(known) if len(known) == len(values) else None)
        table.append(row)
    return ResultTable([SECONDS, *runs], table, "validation loss, nats, against seconds of training")


def loss_at(rows: list[dict[str, Any]], seconds: float) -> float | None:
    """The last evaluation's loss that a run had after so many seconds of training; None before the first."""
    loss = None
    for row, clock in zip(rows, _clock(rows), strict=True):
        if clock > seconds:
            break
        loss = row.get("val_loss", loss)
    return loss


def _rows(side: TimedRun, overrides: list[str], steps: int, seed: int, evaluations: int) -> list[dict[str, Any]]:
    """A run's metrics, a dict a step. Raises UserError with the end of its output where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        every = max(1, steps // evaluations)
        own = [f"train.steps={steps}", f"train.seed={seed}", f"train.eval_every={every}"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m"]
        command += [*side.module, *PRESET, *overrides, *side.keys, *own, f"run_dir={folder}/run"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"bench time_to_loss, {side.name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        with (Path(folder) / "run" / "metrics.jsonl").open() as file:
            rows = [json.loads(line) for line in file]
    if skipped := rows[-1].get("skipped_steps"):  # the reference skips none
        raise UserError(f"bench time_to_loss, {side.name}: {counted(skipped, 'step')} of {steps} skipped (seed {seed})")
    return rows


def _clock(rows: list[dict[str, Any]]) -> list[float]:
    """Seconds of training at each step's end."""
    return list(itertools.accumulate(row["step_seconds"] for row in rows))


def _seconds(rows: list[dict[str, Any]]) -> float:
    return _clock(rows)[-1]


def _seconds_a_step(rows: list[dict[str, Any]]) -> float:
    return statistics.median(row["step_seconds"] for row in rows)
