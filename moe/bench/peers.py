"""`moe bench peers`: our training step, with its engine, beside transformers' MixtralForCausalLM, in one process.

    moe bench peers                                        # configs/model/small.yaml, 4 × 512 tokens
    moe bench peers precision=bfloat16                     # beside its best bfloat16 step with float32 master weights
    moe bench peers rounds=9 steps=4
    moe bench peers model=tiny train.sequence_length=256   # any key of `moe train`

Both sides have the same weights (loaded by name), data, dtype, threads, optimizer (AdamW, fused), clipping and number
of steps. The peer uses its fastest experts implementation and bfloat16 arithmetic with float32 master weights
(`moe.bench.peer`), found by timing them here; in bfloat16 its fastest float32 step and its fastest step without master
weights are measured too. Rounds alternate which side goes first, and the ratio is computed within each round, since a
shared machine's speed drifts. Before anything is timed, both must compute the same loss. Ours also computes a z-loss;
transformers has none.

DeepSpeed has a sparse layer and no model. So on a CPU a second table compares the layer alone, forward and backward:
ours, transformers' and `deepspeed.moe.layer.MoE` with the same weights (moe/engine/deepspeed/own_layer.py says how it
is set). Outputs and gradients must agree first.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe.bench.clock import conditions
from moe.bench.peer import (
    GPU_IMPLEMENTATIONS,
    IMPLEMENTATIONS,
    ROUNDED,
    Arithmetic,
    Peer,
    Step,
    copied_too_large,
    loss_gap,
    peer_model,
    require_transformers,
)
from moe.bench.peer_keys import parse
from moe.bench.peer_layer import compare_layers
from moe.bench.results import Cell, Results, ResultTable
from moe.bench.settings import Rounds, counted, spread
from moe.bench.stepper import batch_of, timed_step
from moe.config import AttentionBackend, Config, EngineKind, Precision
from moe.distributed import rendezvous
from moe.distributed.mesh import Mesh
from moe.engine import build_engine, prepare
from moe.engine.base import Engine
from moe.errors import UserError
from moe.kernels.policy import torch_dtype
from moe.model.build import build_model, empty_model
from moe.model.transformer import Transformer
from moe.plan import flops_per_token
from moe.train.metrics import measure_peak_flops

WARM_UP_STEPS = 2
FIGURES = {"peer": "ratio tokens/s {}", "float32": "ratio to float32 {}", "pure": "ratio to pure bfloat16 {}"}
# A peer's step is measured no further where its first takes longer than both: as many times the fastest one's, seconds.
HOPELESS, LONG_STEP = 3.0, 10.0


@dataclass(slots=True)
class Round:
    """Tokens per second of each side, FLOP/s of a matrix product in the step's dtype, and our routers' MaxVio, measured
    one after another."""

    speeds: dict[str, float]
    peak: float
    max_violation: float


def run(overrides: list[str]) -> Results:
    """The comparison; its last line is `ratio tokens/s N.NN`. Raises UserError."""
    keys, config = parse(overrides)
    require_transformers("peers")
    if rendezvous.world_from_environment()[1] != 1:
        raise UserError("bench peers compares single processes: start it without torchrun")
    mesh = rendezvous.start(1)
    try:
        rounds, names = compare(keys, config, mesh)
        compared = results(config, rounds, names)
        if mesh.device.type == "cpu":
            layers = compare_layers(config, keys.rounds)
            compared.tables += layers.tables
            compared.notes += layers.notes
            compared.figures = layers.figures | compared.figures
    finally:
        rendezvous.stop()
    return compared


def our_name(config: Config) -> str:
    """What our side is, in tables."""
    if config.engine is EngineKind.plain:
        return "ours, plain engine"
    return f"ours, DeepSpeed ZeRO-{config.parallel.zero_stage}"


def compare(
    keys: Rounds,
    config: Config,
    mesh: Mesh,
    ours: Transformer | None = None,
    *,
    masters_alone: bool = False,
    log: Callable[[str], None] = print,
) -> tuple[list[Round], dict[str, str]]:
    """The measured rounds and {side: what it is}. The sides are `ours`, `peer` and, where the step is bfloat16 and
    unless `masters_alone`, the peer's fastest steps `float32` and `pure`, the latter unless it is hopelessly slower
    than `peer`.

    `ours` is a model of `config` in float32; None builds one with the initial weights of `moe train`.
    """
    mesh = prepare(config, mesh)
    ours = build_model(config, mesh.device) if ours is None else ours
    weights = {name: value.detach().clone() for name, value in ours.state_dict().items()}
    batches = batches_of(config, mesh.device)
    reference = peer_model(config, device=mesh.device)
    reference.load_state_dict(weights)
    gap = loss_gap(_without_compilation(ours, config, weights), reference, ids := batches())
    log(f"first loss: the two differ by {gap:.1e} nats (language model) at most, balance loss included")
    del reference
    our_step = OurStep(build_engine(ours, config, mesh), config)
    sides: dict[str, Step] = {"ours": our_step}
    names = {"ours": our_name(config)}
    kinds = {"peer": [Arithmetic.float32]}
    narrow = config.train.precision is not Precision.float32
    if narrow:
        kinds = {"peer": [Arithmetic.autocast, Arithmetic.master]}
        kinds |= {} if masters_alone else {"float32": [Arithmetic.float32], "pure": [Arithmetic.pure]}
        our_step(ids)
    seconds = math.inf
    for side, arithmetics in kinds.items():
        known = seconds if side == "pure" else math.inf
        peer, least = _fastest(weights, config, arithmetics, batches, mesh.device, log, known)
        if peer is None:
            continue
        sides[side], names[side] = peer, f"transformers, {peer.name}"
        if side == "peer":
            seconds = least
        if narrow and side != "float32":
            log(_check_rounding(our_step.lm_loss, peer, weights, config, ids))
    for _ in range(WARM_UP_STEPS):
        ids = batches()
        for step in sides.values():
            step(ids)
    tokens = keys.steps * config.train.global_batch_size * config.train.sequence_length
    dtype = torch_dtype(config.train.precision)
    rounds = []
    for index in range(keys.rounds):
        data = [batches() for _ in range(keys.steps)]
        order = [*sides][:: -1 if index % 2 else 1]
        speeds = {side: tokens / _seconds(sides[side], data) for side in order}
        rounds.append(Round(speeds, measure_peak_flops(mesh.device, dtype), our_step.max_violation))
    return rounds, names


def _fastest(
    weights: dict[str, Tensor],
    config: Config,
    arithmetics: list[Arithmetic],
    batches: Callable[[], Tensor],
    device: torch.device,
    log: Callable[[str], None],
    known: float,
) -> tuple[Peer | None, float]:
    """The fastest of the peer's steps, as new, and its seconds; logs each one's time. None where all are hopeless
    beside a step of `known` seconds. Raises RuntimeError where none can be computed."""
    seconds: dict[tuple[Arithmetic, str], float] = {}
    tokens, layers = config.train.micro_batch_size * config.train.sequence_length, config.model.num_hidden_layers
    implementations = (*IMPLEMENTATIONS, *(GPU_IMPLEMENTATIONS if device.type == "cuda" else ()))
    for arithmetic, implementation in itertools.product(arithmetics, implementations):
        reason = copied_too_large(config, tokens, layers, device) if implementation == "batched_mm" else None
        if reason is None:
            peer = None
            try:
                peer = Peer(weights, config, arithmetic, implementation, device)
                first = _seconds(peer, [batches()])
            except (RuntimeError, ImportError, ValueError) as error:  # no product for this dtype, no such package
                reason = str(error).splitlines()[0]
            else:
                if first > max(LONG_STEP, HOPELESS * min(seconds.values(), default=known)):
                    log(f"peer's experts, {peer.name}: left out, its first step took {first * 1e3:,.0f} ms")
                    continue
                seconds[arithmetic, implementation] = min(_seconds(peer, [batches()]) for _ in range(2))
                log(f"peer's experts, {peer.name}: {seconds[arithmetic, implementation] * 1e3:,.0f} ms/step")
                continue
            finally:
                del peer  # its memory is free for the next one
        log(f"peer's experts, {implementation}, {arithmetic.value}: left out, {reason}")
    if not seconds and known < math.inf:
        return None, known
    if not seconds:
        raise RuntimeError("none of the peer's steps can be computed here")
    best = min(seconds, key=lambda one: seconds[one])
    return Peer(weights, config, *best, device), seconds[best]


def _without_compilation(ours: Transformer, config: Config, weights: dict[str, Tensor]) -> Transformer:
    """`ours`; on CUDA, where its attention would be compiled for float32, the same model with attention in blocks."""
    device = next(iter(weights.values())).device
    if device.type == "cpu":
        return ours
    model = empty_model(replace(config, model=replace(config.model, attention=AttentionBackend.block)), device)
    model.load_state_dict(weights)
    return model


def _check_rounding(ours: float, peer: Peer, weights: dict[str, Tensor], config: Config, ids_BS: Tensor) -> str:
    """A line for the log. Raises RuntimeError where a bfloat16 loss is further from the float32 one than rounding
    explains."""
    exact = Peer(weights, config, Arithmetic.float32, "eager", ids_BS.device).lm_loss(ids_BS)
    gaps = abs(ours - exact), abs(peer.lm_loss(ids_BS) - exact)
    if not max(gaps) <= ROUNDED:
        raise RuntimeError(f"bfloat16 losses differ from float32 by {gaps[0]:.1e} and {gaps[1]:.1e} nats")
    return f"first loss in bfloat16: ours is {gaps[0]:.1e} and {peer.name}'s {gaps[1]:.1e} nats from float32"


def results(config: Config, rounds: list[Round], names: dict[str, str]) -> Results:
    """The last figure is `ratio tokens/s`, the median of the rounds' ratios."""
    flops, step_tokens = flops_per_token(config), config.train.global_batch_size * config.train.sequence_length
    peak = statistics.median(each.peak for each in rounds)
    rows: list[list[Cell]] = []
    for side, name in names.items():
        speed = statistics.median(each.speeds[side] for each in rounds)
        share = statistics.median(each.speeds[side] * flops / each.peak for each in rounds)
        rows.append([name, speed, step_tokens / speed * 1e3, speed * flops / 1e9, 100 * share])
    rows.append([f"matrix product ({config.train.precision.value})", None, None, peak / 1e9, None])
    notes = [
        f"medians of {counted(len(rounds), 'alternating round')}, {conditions('wall-clock')}",
        f"FLOPs are the model's own ({flops / 1e6:,.1f} MFLOP per token); "
        f"ours has MaxVio {rounds[-1].max_violation:.2f}",
    ]
    figures = {}
    for side in list(names)[:0:-1]:
        ratios = [each.speeds["ours"] / each.speeds[side] for each in rounds]
        notes.append(f"beside {names[side]}: ratio per round {spread(ratios)}")
        figures[FIGURES[side]] = statistics.median(ratios)
    return Results([ResultTable(["", "tokens/s", "ms/step", "GFLOP/s", "% of product"], rows)], notes, figures)


def batches_of(config: Config, device: torch.device) -> Callable[[], Tensor]:
    """A function that returns random token ids [B, S], the same sequence of batches in every run."""
    train, generator = config.train, torch.Generator().manual_seed(config.train.seed)
    shape = (train.micro_batch_size, train.sequence_length)
    return lambda: torch.randint(config.model.vocab_size, shape, generator=generator).to(device)


class OurStep:
    """Each call is one optimizer step of `engine`; keeps its language-model loss and MaxVio. Raises RuntimeError for a
    skipped step."""

    def __init__(self, engine: Engine, config: Config) -> None:
        self._engine, self._config, self._steps = engine, config, itertools.count()
        self.lm_loss = self.max_violation = math.nan

    def __call__(self, ids_BS: Tensor) -> float:
        batch = batch_of(ids_BS.cpu())
        done = timed_step(self._config, self._engine, [batch], next(self._steps))
        self.lm_loss, self.max_violation = done.metrics["lm_loss"], done.metrics["max_violation"]
        return done.metrics["loss"]


def _seconds(step: Step, data: list[Tensor]) -> float:
    """Wall time of one step per batch. Each step reads its loss on the host, so a GPU's work is included."""
    start = time.perf_counter()
    for ids_BS in data:
        step(ids_BS)
    return time.perf_counter() - start
