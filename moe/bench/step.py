"""`moe bench step`: one training step split by part: waiting for data, parts of the model, optimizer, metrics.

    moe bench step                                  # the model and batch of `moe bench peers`, on text from Python
    moe bench step precision=bfloat16 rounds=9
    moe bench step model=tiny engine=plain          # any key of `moe train`

Takes `rounds` steps as they are and `rounds` under torch.profiler, which slows them down; a part's share of the
profiled time says what it takes of the whole (`moe.train.profile`, as in `moe train profile=true`). FLOPs are those
that the model needs (`moe.plan`), and `% of product` compares a part with the fastest large matrix product. The text
is prepared first, as by `moe prepare`.
"""

from __future__ import annotations

import statistics
from collections import Counter

from torch.profiler import ProfilerActivity, profile

from moe.bench import peers
from moe.bench.clock import conditions, now
from moe.bench.results import Cell, Results, ResultTable
from moe.bench.settings import Rounds, spread
from moe.bench.stepper import timed_step
from moe.config import Config
from moe.data.loader import Loader
from moe.data.prepare import prepare as prepare_data
from moe.distributed import rendezvous
from moe.distributed.mesh import Mesh
from moe.engine import build_engine, prepare
from moe.engine.base import Engine
from moe.errors import UserError
from moe.kernels.policy import torch_dtype
from moe.model.build import build_model
from moe.plan.flops import flops_by_part
from moe.train.metrics import measure_peak_flops
from moe.train.profile import PARTS, PartRanges, attributed, in_part

WARM_UP_STEPS = 3
LARGEST = 12  # operations that are listed
FLOPS_OF = {"head": "loss"}  # a part of `moe.plan` under another name than in PARTS


def run(overrides: list[str]) -> Results:
    """A row for each part and for the largest operations. Raises UserError."""
    keys, config = parse(overrides)
    if rendezvous.world_from_environment()[1] != 1:
        raise UserError("bench step measures one process: start it without torchrun")
    length = config.train.sequence_length
    corpus = prepare_data(config.data, config.tokenizer, sequence_length=length, log=print)
    train = config.train
    loader = Loader(
        corpus,
        sequence_length=length,
        micro_batch_size=train.micro_batch_size,
        global_batch_size=train.global_batch_size,
        seed=train.seed,
    )
    mesh = rendezvous.start(1)
    try:
        if mesh.device.type != "cpu":
            raise UserError("bench step measures a CPU; on a GPU: moe train profile=true")
        return measure(keys, config, mesh, loader)
    finally:
        rendezvous.stop()


def parse(overrides: list[str]) -> tuple[Rounds, Config]:
    """`rounds=`, `precision=` and the overrides of `moe train`. Raises UserError."""
    return peers.parse(overrides, Rounds(rounds=5), names=("rounds",))


def measure(keys: Rounds, config: Config, mesh: Mesh, loader: Loader) -> Results:
    mesh = prepare(config, mesh)
    step = _LoadedStep(config, build_engine(build_model(config, mesh.device), config, mesh), loader)
    for _ in range(WARM_UP_STEPS):
        step()
    plain = [step() for _ in range(keys.rounds)]
    ranges = PartRanges(step.engine)
    try:
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            slowed = []
            for _ in range(keys.rounds):
                with in_part("other"):
                    slowed.append(step())
    finally:
        ranges.remove()
    forward, backward, operations = Counter[str](), Counter[str](), dict[tuple[str, str], list[float]]()
    for event, part, is_backward in attributed(recorded.events() or []):
        milliseconds = event.self_cpu_time_total / 1e3 / keys.rounds
        (backward if is_backward else forward)[part] += milliseconds
        operations.setdefault((event.name.removeprefix("autograd::engine::evaluate_function: "), part), []).append(
            milliseconds
        )
    seconds = statistics.median(plain)
    total = sum(forward.values()) + sum(backward.values())
    dtype = torch_dtype(config.train.precision)
    peak = max(measure_peak_flops(mesh.device, dtype, clock=now) for _ in range(keys.rounds))
    tokens = config.train.global_batch_size * config.train.sequence_length
    needed = {FLOPS_OF.get(name, name): tokens * part.total for name, part in flops_by_part(config).items()}
    parts = ResultTable(["part", "forward, ms", "backward, ms", "% of step", "GFLOP/s", "% of product", "what"], [])
    for part, what in PARTS.items():
        spent = forward[part] + backward[part]
        if not spent:
            continue  # the model has no such part
        share = spent / total
        rate = needed.get(part, 0.0) / (share * seconds) or None
        row: list[Cell] = [part, forward[part], backward[part], 100 * share, rate and rate / 1e9]
        parts.rows.append([*row, rate and 100 * rate / peak, what])
    listed = sorted(operations.items(), key=lambda one: -sum(one[1]))[:LARGEST]
    largest = ResultTable(
        ["operation", "part", "calls a step", "ms a step"],
        [[name, part, round(len(each) / keys.rounds), sum(each)] for (name, part), each in listed],
        "the largest operations",
    )
    wait = forward["data wait"] / total
    rates = sum(needed.values()) / seconds
    notes = [
        f"a step takes {seconds * 1e3:,.0f} ms, {tokens / seconds:,.0f} tokens/s; under the profiler "
        f"{statistics.median(slowed) / seconds:.2f} × that: the parts' ms are the profiler's, wall-clock",
        f"medians of {keys.rounds} steps, {spread([one / seconds for one in plain])} of the median; "
        f"{conditions()}; MaxVio {step.max_violation:.2f}; product {peak / 1e9:,.0f} GFLOP/s "
        f"({config.train.precision.value})",
    ]
    return Results([parts, largest], notes, {"data wait {} % of a step": 100 * wait, "MFU {} %": 100 * rates / peak})


class _LoadedStep:
    """Each call is one optimizer step on the loader's next batch; returns its seconds."""

    def __init__(self, config: Config, engine: Engine, loader: Loader) -> None:
        self.engine, self._config, self._loader, self._step = engine, config, loader, 0
        self.max_violation = float("nan")

    def __call__(self) -> float:
        start, config = now(), self._config
        with in_part("data wait"):
            batches = self._loader.next_step()
        done = timed_step(config, self.engine, batches, self._step)
        self._step += 1
        self.max_violation = done.metrics["max_violation"]
        return now() - start
