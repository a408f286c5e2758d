"""The lines that a run prints before its first step: its size, its cost, and the back-ends it uses."""

from __future__ import annotations

import torch

from moe.config import Config, EngineKind, Mlp, OptimizerKind
from moe.distributed.mesh import Mesh
from moe.kernels.attention import resolve_attention
from moe.kernels.expert_backends import (
    BackendTimes,
    ExpertLoad,
    candidates,
    event_milliseconds,
    is_unmeasured,
    measure,
    resolve_backend,
    take,
)
from moe.kernels.float8_products import require_float8
from moe.kernels.policy import choose_products, fused_obstacle, torch_dtype
from moe.plan import count_parameters, estimate_memory, flops_per_token
from moe.plan.muon import muon_cost
from moe.plan.trained import count_trained, trains_all
from moe.train.metrics import measure_peak_flops


def check_backends(config: Config, device: torch.device) -> None:
    """Raises UserError if a back-end that the configuration names can't run here: known before any data is read."""
    model, dtype = config.model, torch_dtype(config.train.precision)
    resolve_attention(model.attention, device, dtype, model.head_size)
    if model.mlp is Mlp.sparse:
        resolve_backend(config.experts, device, dtype, (model.hidden_size, model.expert_size))
        if config.experts.fp8:
            require_float8(device, dtype)


def time_experts(config: Config, mesh: Mesh) -> None:
    """On CUDA with `experts.backend=auto`, times the back-ends of the experts at this run's shapes and makes `auto` the
    fastest, on all ranks the same one. Needs memory for two copies of a layer's experts, for some seconds. A
    collective."""
    model, router, dtype = config.model, config.router, torch_dtype(config.train.precision)
    shapes = (model.hidden_size, model.expert_size)
    if model.mlp is not Mlp.sparse or config.adapts_experts:  # adapters' products are others
        return
    if not is_unmeasured(config.experts, mesh.device, dtype, shapes):
        return
    tokens = config.train.micro_batch_size * config.train.sequence_length
    rows = tokens * router.most_choices_in(model.sparse_layer_numbers) // config.experts.exchanges
    load = ExpertLoad(*shapes, router.num_experts // mesh.expert_parallel_size, max(1, rows))

    def timed() -> BackendTimes:
        try:
            return measure(candidates(mesh.device, dtype, shapes), load, mesh.device, dtype, event_milliseconds)
        except torch.OutOfMemoryError:
            return BackendTimes({}, {})
        finally:
            torch.cuda.empty_cache()

    mesh.barrier()  # all ranks measure at the same time, since they will compute at the same time
    take(mesh.gather(mesh.agree(timed, "back-ends")), mesh.device, dtype, load)


def choose_backends(config: Config, mesh: Mesh) -> list[str]:
    """Lines that name the attention and expert back-ends and the reason for each.

    Raises UserError if a back-end that the configuration names can't run here.
    """
    model, dtype = config.model, torch_dtype(config.train.precision)
    attention, reason = resolve_attention(model.attention, mesh.device, dtype, model.head_size)
    lines = [f"attention: {attention.name} ({reason})", choose_products(mesh.device, dtype)]
    if mesh.device.type == "cuda":
        fault = fused_obstacle(mesh.device, dtype)
        route = "Triton (each gave the plain code's results here)" if fault is None else f"plain PyTorch ({fault})"
        lines.append(f"element-wise kernels: {route}")
    if model.mlp is Mlp.sparse:
        shapes = (model.hidden_size, model.expert_size)
        backend, reason = resolve_backend(config.experts, mesh.device, dtype, shapes)
        if config.experts.fp8:
            reason = require_float8(mesh.device, dtype)
        router = config.router
        each = f"{router.experts_per_token} a token"
        if model.n_shared_experts:
            each += f", {model.n_shared_experts} shared"
        if len(model.sparse_layer_numbers) < model.num_hidden_layers:
            each += f", in layers {', '.join(map(str, model.sparse_layer_numbers))}"
        lines.append(f"router: {router.kind}; experts: {router.num_experts}, {each}, {backend.name} ({reason})")
    return lines


def peak_flops(config: Config, mesh: Mesh) -> float:
    """FLOP/s of one rank: `train.peak_tflops`, or else the measured speed of a matrix product, averaged over ranks."""
    if config.train.peak_tflops is not None:
        return config.train.peak_tflops * 1e12
    mesh.barrier()  # all ranks measure at the same time, since they will compute at the same time
    peak = torch.tensor(
        measure_peak_flops(mesh.device, torch_dtype(config.train.precision)), dtype=torch.float64, device=mesh.device
    )
    return float(mesh.sum_(peak)) / mesh.world_size


def describe_run(config: Config, mesh: Mesh, peak: float) -> list[str]:
    """The run's size and cost, one line each; `peak` is in FLOP/s of one rank."""
    train, world = config.train, mesh.world_size
    (total, active), memory = count_parameters(config), estimate_memory(config, world, mesh.device.type)
    kinds = ", ".join(f"{name} {_size(size)}" for name, size in memory.items())
    zero = f" (ZeRO-{config.parallel.zero_stage})" if config.engine is EngineKind.deepspeed else ""
    engine = config.engine.name + zero
    stated = "measured" if train.peak_tflops is None else "stated"
    frozen = ""
    if not trains_all(config):
        trains = count_trained(config)
        frozen = f"; {trains:,} train ({100 * trains / total:.2g} %)"
    return [
        f"model: {total:,} parameters, {active:,} active per token, "
        f"{flops_per_token(config) / 1e6:,.0f} MFLOP per token in training{frozen}",
        f"ranks: {world}, expert-parallel size {mesh.expert_parallel_size}, engine {engine}, "
        f"{train.precision.name} on {mesh.device.type}, {torch.get_num_threads()} threads a rank",
        f"step: {train.global_batch_size * train.sequence_length:,} tokens = {train.global_batch_size} sequences × "
        f"{train.sequence_length}, {config.accumulation(world)} micro-batches a rank",
        *_exchange(config),
        *_rate(config),
        *_optimizer(config),
        f"memory: about {_size(sum(memory.values()))} a rank ({kinds})",
        f"peak: {peak / 1e9:,.0f} GFLOP/s a rank, {stated}; MFU is relative to it",
    ]


def _rate(config: Config) -> list[str]:
    """A line where it isn't `optim.lr`."""
    optim, width = config.optim, config.model.hidden_size
    if optim.base_hidden_size in (None, width):
        return []
    product = f"optim.lr {optim.lr:g} × optim.base_hidden_size {optim.base_hidden_size} / model.hidden_size {width}"
    return [f"learning rate: {config.peak_rate:g} = {product}"]


def _exchange(config: Config) -> list[str]:
    """A line where the keys of the exchange are stated."""
    experts, stated = config.experts, []
    if experts.two_batch_overlap:
        stated.append("the halves of a micro-batch in turn")
    if experts.exchange_chunks > 1:
        stated.append(f"{experts.exchange_chunks} chunks")
    if not stated:
        return []
    none = " (none at expert-parallel size 1)" if config.parallel.expert_parallel_size == 1 else ""
    return [f"exchange of rows: {', '.join(stated)}{none}"]


def _optimizer(config: Config) -> list[str]:
    """A line where it isn't AdamW alone."""
    if config.optim.kind is OptimizerKind.adamw:
        return []
    cost = muon_cost(config, 1)
    by_muon = round(cost.share)
    return [
        f"optimizer: Muon for {by_muon:,} parameters, {cost.flops / 1e9:,.1f} GFLOP a step; AdamW for "
        f"{count_trained(config) - by_muon:,}"
    ]


def _size(count: float) -> str:
    """Bytes as readable text, 3 digits."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}"
