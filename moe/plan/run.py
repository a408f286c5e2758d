"""The plan: what a configuration needs on the given hardware, whether it fits, and what would make it fit."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from typing import Any

from moe.config import DeviceKind, Mlp, PlanConfig, Precision, Recompute
from moe.config.flat import typed
from moe.errors import UserError
from moe.plan.counts import count_parameters
from moe.plan.flops import counts_first, flops_by_part, flops_per_token
from moe.plan.gradients import element_size, local_tensors, trained_tensors
from moe.plan.memory import MemoryPlan, plan_memory
from moe.plan.muon import muon_cost
from moe.plan.traffic import Flow, exchange_bytes, plan_traffic

GB = 1e9
KEPT = ("activations", "moe_buffers", "recomputed")


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one step with arithmetic at the hardware's stated peak; `exchange` is the experts' part of the links'.
    With links at their stated rates these are lower bounds: `overlapped` for any run, `in_turn` for one without any
    overlap."""

    compute: float
    update: float
    intra: float
    inter: float
    exchange: float

    @property
    def overlapped(self) -> float:
        """Arithmetic and both links at the same time, then the update."""
        return max(self.compute, self.intra, self.inter) + self.update

    @property
    def in_turn(self) -> float:
        """Everything one after the other."""
        return self.compute + self.intra + self.inter + self.update

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {"at_best": self.overlapped, "nothing_overlaps": self.in_turn}


@dataclass(frozen=True, slots=True)
class Plan:
    config: PlanConfig
    memory: MemoryPlan
    recomputing: dict[Recompute, int]  # bytes of all layers' activations for each value of `model.recompute`
    recomputed_flops: dict[Recompute, float]  # FLOPs that each adds to a micro-batch
    traffic: dict[str, Flow]
    times: Times  # links at their stated rates
    slow_times: Times  # links as `_times` has them with `slow`
    advice: list[str]  # overrides with which it fits; [] when it fits already or when none were found
    advised_gb: float  # what the run needs with `advice`; if nothing fits, the least that was found
    note: str = ""  # what the plan changed in the configuration

    @property
    def needed_gb(self) -> float:
        return needed_gb(self.config, self.memory)

    @property
    def fits(self) -> bool:
        return self.needed_gb <= self.config.hardware.memory_gb and self.host_gb <= self.config.hardware.host_memory_gb

    @property
    def host_gb(self) -> float:
        return _host_gb(self.config, self.memory)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, bytes and seconds, for JSON."""
        config, world = self.config, self.config.hardware.world_size
        total, active = count_parameters(config)
        tokens = config.train.global_batch_size * config.train.sequence_length
        flops = flops_per_token(config)
        return {
            "hardware": asdict(config.hardware) | {"device": config.hardware.device.name},
            "parameters": {"total": total, "active": active, "per_rank": local_tensors(config, world).local},
            "flops_per_token": flops,
            "step": {
                "tokens": tokens,
                "ranks": world,
                "expert_parallel_size": config.parallel.expert_parallel_size,
                "micro_batches_per_rank": config.accumulation(world),
                "flops": flops * tokens,
                "optimizer_flops": muon_cost(config, world).flops,
            },
            "memory_bytes_per_rank": {
                "imbalance": config.plan.imbalance,
                "phases": self.memory.phases,
                "peak_phase": self.memory.peak_phase,
                "peak": self.memory.peak,
                "activations_by_recompute": {kind.name: size for kind, size in self.recomputing.items()},
                "flops_by_recompute": {kind.name: flops for kind, flops in self.recomputed_flops.items()},
                "host": self.memory.host,
                "host_while_saving": self.memory.checkpoint_host,
            },
            "sent_bytes_per_rank_and_step": {
                name: {"inside_node": flow.intra, "between_nodes": flow.inter} for name, flow in self.traffic.items()
            },
            "exchange_calls_per_step": exchange_bytes(config, world).calls,
            "seconds_per_step": self.times.as_dict(),
            "seconds_per_step_slow_links": self.slow_times.as_dict(),
            "tokens_per_second": {
                "at_best": tokens / self.times.overlapped,
                "nothing_overlaps": tokens / self.times.in_turn,
                "nothing_overlaps_slow_links": tokens / self.slow_times.in_turn,
            },
            "note": self.note,
            "fits": self.fits,
            "needed_gb": self.needed_gb,
            "memory_gb": config.hardware.memory_gb,
            "node_host_gb": self.host_gb,
            "advice": self.advice,
            "needed_gb_with_advice": self.advised_gb,
        }


def needed_gb(config: PlanConfig, memory: MemoryPlan) -> float:
    """Device memory of a rank, the reserved part included."""
    return memory.peak / GB + config.hardware.reserved_gb


def _host_gb(config: PlanConfig, memory: MemoryPlan) -> float:
    """Host memory of a node while a checkpoint is written, which is when a run uses most."""
    return (memory.host + memory.checkpoint_host) * config.hardware.gpus_per_node / GB


def make_plan(asked: PlanConfig) -> Plan:
    """Plans `asked`. A global batch that the ranks can't share is rounded up, and the plan's note says so. Raises
    UserError in all other cases in which `moe train` would on this many ranks."""
    config, note = _rounded(asked), ""
    _check(config)
    if config is not asked:
        note = (
            f"train.global_batch_size={asked.train.global_batch_size} can't be cut into micro-batches of "
            f"{config.train.micro_batch_size} on {config.hardware.world_size} ranks: planned with "
            f"{config.train.global_batch_size}"
        )
    memory = _memory(config)
    recomputing = {
        kind: sum(_memory(_with(config, {"model.recompute": kind})).phases["loss"][part] for part in KEPT)
        for kind in Recompute
        if kind is not Recompute.mlp or not config.experts.two_batch_overlap  # which can't be combined
    }
    plain = _flops(_with(config, {"model.recompute": Recompute.none}))
    tokens = config.train.micro_batch_size * config.train.sequence_length
    more = {kind: tokens * (_flops(_with(config, {"model.recompute": kind})) - plain) for kind in recomputing}
    traffic = plan_traffic(config, config.hardware.nodes, config.hardware.gpus_per_node)
    advice, advised = [], needed_gb(config, memory)
    if advised > config.hardware.memory_gb or _host_gb(config, memory) > config.hardware.host_memory_gb:
        advice, advised = _advise(asked, round_up=bool(note))
    times, slow = (_times(config, traffic, slow=slow) for slow in (False, True))
    return Plan(config, memory, recomputing, more, traffic, times, slow, advice, advised, note)


def _rounded(config: PlanConfig) -> PlanConfig:
    """`config` with the global batch rounded up to whole micro-batches on every rank; itself if it already is."""
    train = config.train
    together = train.micro_batch_size * config.hardware.world_size
    size = -(-train.global_batch_size // together) * together
    return config if size == train.global_batch_size else _with(config, {"train.global_batch_size": size})


def _check(config: PlanConfig) -> None:
    config.check_world(config.hardware.world_size, config.hardware.gpus_per_node)


def _memory(config: PlanConfig) -> MemoryPlan:
    return plan_memory(
        config, config.hardware.world_size, device=config.hardware.device.name, imbalance=config.plan.imbalance
    )


def _times(config: PlanConfig, traffic: dict[str, Flow], *, slow: bool) -> Times:
    """Links at their stated rates and even routing; or `slow`: `hardware.link_efficiency` of the rates,
    `hardware.exchange_latency_us` for each all-to-all, which ends when the rank with most rows has them."""
    hardware, train, world = config.hardware, config.train, config.hardware.world_size
    tokens = train.global_batch_size * train.sequence_length / world
    half = train.precision is Precision.bfloat16
    peak = (hardware.peak_tflops if half else hardware.peak_tflops_float32) * 1e12
    muon = muon_cost(config, world, device=hardware.device.name).flops / world
    muon_peak = peak if hardware.device is DeviceKind.cuda else hardware.peak_tflops_float32 * 1e12
    # Adam reads gradients, master weights and both moments, writes the last three, and writes the model's weights.
    moved = (7 * 4 + element_size(config)) * trained_tensors(config, world).share
    efficiency, fullest = (hardware.link_efficiency, _fullest(config)) if slow else (1.0, 1.0)
    intra, inter = (
        hardware.intra_node_gbytes_per_s * GB * efficiency,
        hardware.inter_node_gbytes_per_s * GB * efficiency,
    )
    others = [flow for name, flow in traffic.items() if name != "expert exchange"]
    exchange = traffic["expert exchange"]
    near, far = fullest * exchange.intra / intra, fullest * exchange.inter / inter
    waits = hardware.exchange_latency_us / 1e6 * exchange_bytes(config, world).calls if slow else 0.0
    return Times(
        compute=tokens * _flops(config) / peak,
        update=moved / (hardware.memory_bandwidth_gbytes_per_s * GB) + muon / muon_peak,
        intra=near + sum(flow.intra for flow in others) / intra + (0.0 if exchange.inter else waits),
        inter=far + sum(flow.inter for flow in others) / inter + (waits if exchange.inter else 0.0),
        exchange=max(near, far) + waits,  # which both links can carry at once
    )


def _fullest(config: PlanConfig) -> float:
    """Rows of the rank with most, over the mean."""
    return min(config.plan.imbalance, config.parallel.expert_parallel_size)


def _flops(config: PlanConfig) -> float:
    """FLOPs of one token on the rank with most rows. Recomputation repeats forward passes. Products of float8 operands,
    which GPUs multiply twice as fast as bfloat16, count half: two of the experts' three."""
    parts, recompute = flops_by_part(config), config.model.recompute
    repeated = {
        Recompute.none: (),
        Recompute.mlp: ("experts", "mlp", "router"),
        Recompute.block: ("experts", "mlp", "attention", "router"),
    }[recompute]
    again = {name: parts[name].forward if name in repeated else 0.0 for name in parts}
    if counts_first(config):
        again = {name: more + (parts[name].forward if name != "head" else 0.0) for name, more in again.items()}
    experts = parts["experts"].total
    if config.experts.fp8 and config.hardware.device is DeviceKind.cuda:
        experts *= 2 / 3
        again["experts"] /= 2
    more = _fullest(config) - 1
    others = sum(part.total for name, part in parts.items() if name != "experts")
    return others + sum(again.values()) + experts + more * (experts + again["experts"])


def _with(config: PlanConfig, changes: dict[str, Any]) -> PlanConfig:
    """A copy with some `section.key` values changed. Raises UserError where a rule forbids them."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in sections.items()})


def _advise(config: PlanConfig, *, round_up: bool) -> tuple[list[str], float]:
    """The smallest set of changes that fits and what it needs (GB), found by trying all combinations; among sets of the
    same size the cheapest by the order of `_choices`. If none fits, not even on more nodes: ([], the smallest need).
    """
    least = float("inf")
    for nodes in (1, 2, 4, 8, 16):
        grown = {} if nodes == 1 else {"hardware.nodes": config.hardware.nodes * nodes}
        for changes in _combinations(config):
            try:
                changed = _with(config, changes | grown)
                changed = _rounded(changed) if round_up else changed
                _check(changed)
            except UserError:  # a rule forbids the combination: batch sizes, ranks of a node
                continue
            memory = _memory(changed)
            needed = needed_gb(changed, memory)
            least = min(least, needed)
            if needed <= config.hardware.memory_gb and _host_gb(changed, memory) <= config.hardware.host_memory_gb:
                return [f"{key}={typed(value)}" for key, value in (changes | grown).items()], needed
    return [], least


def _combinations(config: PlanConfig) -> list[dict[str, Any]]:
    """All sets of changes, smaller sets first; among equally large ones, the cheaper first."""
    choices = _choices(config)
    cost = {key: place for place, key in enumerate(choices)}
    options = [[None, *((key, value) for value in values)] for key, values in choices.items()]
    sets = [dict(item for item in chosen if item) for chosen in itertools.product(*options)]
    return sorted(sets, key=lambda chosen: (len(chosen), sum(cost[key] for key in chosen)))


def _choices(config: PlanConfig) -> dict[str, list[Any]]:
    """{key: values to try}, the cheapest change first."""
    model, train, parallel, hardware = config.model, config.train, config.parallel, config.hardware
    sizes: list[int] = []
    if model.mlp is Mlp.sparse:
        count = config.router.num_experts
        limit = min(count, hardware.gpus_per_node)
        sizes = [size for size in range(parallel.expert_parallel_size + 1, limit + 1) if count % size == 0]
    halves = [train.micro_batch_size >> shift for shift in range(1, train.micro_batch_size.bit_length())]
    order = list(Recompute)
    cuda = hardware.device is DeviceKind.cuda
    return {
        "parallel.expert_parallel_size": sizes,
        "train.micro_batch_size": halves,
        "parallel.zero_stage": [2] if parallel.zero_stage == 1 else [],
        "model.recompute": order[order.index(model.recompute) + 1 :],
        "train.precision": [Precision.bfloat16] if cuda and train.precision is Precision.float32 else [],
        "parallel.offload_optimizer": [True] if cuda and not parallel.offload_optimizer else [],
    }
