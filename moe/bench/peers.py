"""`moe bench peers`: our training step, with its engine, beside transformers' MixtralForCausalLM, in one process.

    moe bench peers                                        # configs/model/small.yaml, 4 × 512 tokens
    moe bench peers rounds=9 steps=4
    moe bench peers model=tiny train.sequence_length=256   # any key of `moe train`

Both sides have the same weights (loaded by name), data, dtype, threads, optimizer (AdamW, fused), clipping and number
of steps. The peer uses its fastest experts implementation, found by timing them here. Rounds alternate which side goes
first, and the ratio is computed within each round, since a shared machine's speed drifts. Before anything is timed,
both must compute the same loss. Ours also computes a z-loss; transformers has none.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from moe.bench.settings import Rounds, split
from moe.bench.stepper import batch_of
from moe.config import Config, Mlp, ModelConfig, Precision, TopKRouterConfig
from moe.config.compose import load_config
from moe.config.flat import typed
from moe.distributed import rendezvous
from moe.distributed.mesh import Mesh
from moe.engine import build_engine, prepare
from moe.engine.base import Engine
from moe.errors import UserError
from moe.model.build import build_model
from moe.model.transformer import ModelOutput, Transformer
from moe.plan import flops_per_token
from moe.train.metrics import measure_peak_flops
from moe.train.objective import training_step

DEFAULTS = ["model=small", "train.sequence_length=512", "train.micro_batch_size=4", "train.global_batch_size=4"]
# transformers has two more, deepgemm and sonicmoe: bfloat16 kernels for GPUs.
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
NOT_MIXTRAL = ("sparse_layers", "moe_intermediate_size", "n_shared_experts")
SAME_LOSS = 1e-4  # nats, between the two sides' first losses
WARM_UP_STEPS = 2

Step = Callable[[Tensor], float]  # token ids [B, S] → the step's loss


@dataclass(slots=True)
class Round:
    """Tokens per second of both sides and FLOP/s of a matrix product, measured one after another."""

    ours: float
    peer: float
    peak: float


def parse(overrides: list[str], default: Rounds | None = None) -> tuple[Rounds, Config]:
    """`rounds=`, `steps=` and the overrides of `moe train`. Raises UserError."""
    keys, rest = split(overrides, default)
    config = load_config([*DEFAULTS, *rest])
    train = config.train
    if config.model.mlp is not Mlp.sparse:
        raise UserError(f"model.mlp={config.model.mlp.value} must be sparse: the peer is a Mixtral")
    if not isinstance(config.router, TopKRouterConfig):
        raise UserError(f"router.kind={config.router.kind} must be topk: the peer is a Mixtral")
    free = ("num_experts", "top_k", "aux_loss_coef", "z_loss_coef")
    names = [f"router.{one.name}" for one in fields(TopKRouterConfig) if one.name not in free]
    defaults = {"router": TopKRouterConfig(), "model": ModelConfig()}
    for key in (*names, *(f"model.{name}" for name in NOT_MIXTRAL)):
        section, _, name = key.partition(".")
        value, needed = getattr(getattr(config, section), name), getattr(defaults[section], name)
        if value != needed:
            raise UserError(f"{key}={typed(value)} must be {typed(needed)}: the peer is a Mixtral")
    if train.precision is not Precision.float32:
        raise UserError(f"train.precision={train.precision.value} must be float32: the peer runs without an engine")
    if train.micro_batch_size != train.global_batch_size:
        raise UserError(
            f"train.micro_batch_size={train.micro_batch_size} must equal "
            f"train.global_batch_size={train.global_batch_size}: one micro-batch a step"
        )
    config.check_world(rendezvous.world_from_environment()[1])
    return keys, config


def run(overrides: list[str]) -> None:
    """Prints the comparison; its last line is `ratio tokens/s N.NN`. Raises UserError."""
    keys, config = parse(overrides)
    if importlib.util.find_spec("transformers") is None:
        raise UserError("bench peers needs transformers: pip install 'moe-train[dev]'")
    if rendezvous.world_from_environment()[1] != 1:
        raise UserError("bench peers compares single processes: start it without torchrun")
    mesh = rendezvous.start(1)
    try:
        rounds, implementation = compare(keys, config, mesh)
    finally:
        rendezvous.stop()
    print("\n".join(table(config, rounds, implementation)))


def compare(keys: Rounds, config: Config, mesh: Mesh) -> tuple[list[Round], str]:
    """The measured rounds and the peer's experts implementation."""
    mesh = prepare(config, mesh)
    ours = build_model(config, mesh.device)
    peer = peer_model(config).to(mesh.device)
    peer.load_state_dict(ours.state_dict())
    batches = _batches(config, mesh.device)
    gap = loss_gap(ours, peer, batches(), config)
    print(f"first loss: the two differ by {gap:.1e} nats (language model) at most, balance loss included")
    our_step = _our_step(build_engine(ours, config, mesh), config)
    peer_step = _peer_step(peer, config)
    implementation = _best_implementation(peer, peer_step, batches, config)
    for _ in range(WARM_UP_STEPS):
        ids = batches()
        our_step(ids)
        peer_step(ids)
    tokens = keys.steps * config.train.global_batch_size * config.train.sequence_length
    rounds = []
    for index in range(keys.rounds):
        data = [batches() for _ in range(keys.steps)]
        sides = {"ours": our_step, "peer": peer_step}
        speeds = {}
        for name in sorted(sides, reverse=bool(index % 2)):
            speeds[name] = tokens / _seconds(sides[name], data)
        rounds.append(Round(**speeds, peak=measure_peak_flops(mesh.device, torch.float32)))
    return rounds, implementation


def table(config: Config, rounds: list[Round], implementation: str) -> list[str]:
    """Lines to print; the last is `ratio tokens/s N.NN`, the median of the rounds' ratios."""
    flops, step_tokens = flops_per_token(config), config.train.global_batch_size * config.train.sequence_length
    peak = statistics.median(each.peak for each in rounds)
    lines = [
        f"{'':32}{'tokens/s':>10}{'ms/step':>10}{'GFLOP/s':>10}{'of SGEMM':>10}",
    ]
    names = {"ours": "ours, DeepSpeed ZeRO-1", "peer": f"transformers, {implementation}"}
    for side, name in names.items():
        speed = statistics.median(getattr(each, side) for each in rounds)
        share = statistics.median(getattr(each, side) * flops / each.peak for each in rounds)
        lines.append(
            f"{name:32}{speed:>10,.0f}{step_tokens / speed * 1e3:>10,.0f}{speed * flops / 1e9:>10,.1f}{share:>10.1%}"
        )
    ratios = [each.ours / each.peer for each in rounds]
    lines += [
        f"{'matrix product (SGEMM)':32}{'':>20}{peak / 1e9:>10,.1f}",
        f"medians of {len(rounds)} alternating rounds, {torch.get_num_threads()} threads; FLOPs are the model's own "
        f"({flops / 1e6:,.1f} MFLOP per token); ratio per round {min(ratios):.2f} to {max(ratios):.2f}",
        f"ratio tokens/s {statistics.median(ratios):.2f}",
    ]
    return lines


def peer_model(config: Config, implementation: str = "eager") -> Any:
    """transformers' Mixtral in our shape, with SDPA attention and its balance loss; weights as it initialises them."""
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    model, router = config.model, _top_k(config)
    shapes = MixtralConfig(
        **_shared(model),
        num_local_experts=router.num_experts,
        num_experts_per_tok=router.top_k,
        output_router_logits=True,
        router_aux_loss_coef=router.aux_loss_coef / router.top_k,  # theirs is top_k when uniform, ours 1
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        use_cache=False,
        pad_token_id=None,
    )
    peer = MixtralForCausalLM._from_config(
        shapes, attn_implementation="sdpa", experts_implementation=implementation, dtype=torch.float32
    )
    return peer.train()


def _shared(model: ModelConfig) -> dict[str, Any]:
    ours_only = ("mlp", "attention", "recompute", "hidden_dropout", "rope_theta", *NOT_MIXTRAL)
    return {name: getattr(model, name) for name in ModelConfig.__slots__ if name not in ours_only}


@torch.no_grad()
def loss_gap(ours: Transformer, peer: Any, ids_BS: Tensor, config: Config) -> float:
    """Largest difference between the two sides' losses on one batch, in nats. Raises RuntimeError above `SAME_LOSS`:
    a speed ratio between different computations would mean nothing.

    transformers averages router statistics over layers before multiplying them, ours averages the layers' losses. So
    its formula is applied to our routers' outputs.
    """
    output = ours(ids_BS, labels_BS=batch_of(ids_BS).labels_BS)
    theirs = peer(input_ids=ids_BS, labels=ids_BS)
    nats = float(output.lm_loss_sum) / _targets(ids_BS)
    aux = float(theirs.aux_loss)
    pooled = float(_pooled_balance(output))
    gaps = abs(nats - (float(theirs.loss) - peer.config.router_aux_loss_coef * aux)), abs(pooled - aux)
    if not max(gaps) <= SAME_LOSS:
        raise RuntimeError(
            f"the two sides compute different things: losses differ by {gaps[0]:.1e}, balance by {gaps[1]:.1e}"
        )
    return max(gaps)


def _top_k(config: Config) -> TopKRouterConfig:
    assert isinstance(config.router, TopKRouterConfig)
    return config.router


def _pooled_balance(output: ModelOutput) -> Tensor:
    counts_E = torch.stack([each.counts_E for each in output.routers]).sum(0)
    probs_E = torch.cat([each.probs_TE for each in output.routers]).mean(0)
    rows = sum(each.probs_TE.shape[0] for each in output.routers)
    return probs_E.numel() * torch.dot(counts_E / rows, probs_E)


def _batches(config: Config, device: torch.device) -> Callable[[], Tensor]:
    """A function that returns random token ids [B, S], the same sequence of batches in every run."""
    train, generator = config.train, torch.Generator().manual_seed(config.train.seed)
    shape = (train.micro_batch_size, train.sequence_length)
    return lambda: torch.randint(config.model.vocab_size, shape, generator=generator).to(device)


def _targets(ids_BS: Tensor) -> int:
    return ids_BS.shape[0] * (ids_BS.shape[1] - 1)


def _our_step(engine: Engine, config: Config) -> Step:
    steps = itertools.count()

    def step(ids_BS: Tensor) -> float:
        batch = batch_of(ids_BS.cpu())
        done = training_step(config, engine.mesh, engine, [batch], step=next(steps), lr=config.optim.lr)
        if done.result.skipped:
            raise RuntimeError(f"a step was skipped ({done.result.skipped.value}): its time would say nothing")
        return done.metrics["loss"]

    return step


def _peer_step(peer: Any, config: Config) -> Step:
    optim = config.optim
    matrices = [parameter for parameter in peer.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in peer.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optim.lr,
        betas=(optim.betas[0], optim.betas[1]),
        eps=optim.eps,
        fused=True,
    )

    def step(ids_BS: Tensor) -> float:
        loss = peer(input_ids=ids_BS, labels=ids_BS).loss
        loss.backward()
        nn.utils.clip_grad_norm_(peer.parameters(), optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _best_implementation(peer: Any, step: Step, batches: Callable[[], Tensor], config: Config) -> str:
    """Times each of the peer's experts implementations, prints the times, and sets and returns the fastest."""
    seconds: dict[str, float] = {}
    for name in IMPLEMENTATIONS:
        needed, free = _batched_bytes(config), os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if name == "batched_mm" and needed > free / 2:
            print(f"peer's experts, {name}: left out, it copies {needed / 1e9:.0f} GB of expert weights a step")
            continue
        peer.set_experts_implementation(name)
        step(batches())
        seconds[name] = min(_seconds(step, [batches()]) for _ in range(2))
        print(f"peer's experts, {name}: {seconds[name] * 1e3:,.0f} ms/step")
    best = min(seconds, key=lambda name: seconds[name])
    peer.set_experts_implementation(best)
    return best


def _batched_bytes(config: Config) -> int:
    """Bytes that batched_mm needs: it copies an expert's weights for every choice and keeps the copies for the
    backward pass."""
    model, train = config.model, config.train
    choices = train.micro_batch_size * train.sequence_length * config.router.experts_per_token
    return 4 * choices * 3 * model.hidden_size * model.intermediate_size * model.num_hidden_layers


def _seconds(step: Step, data: list[Tensor]) -> float:
    """Wall time of one step per batch. Each step reads its loss on the host, so a GPU's work is included."""
    start = time.perf_counter()
    for ids_BS in data:
        step(ids_BS)
    return time.perf_counter() - start
