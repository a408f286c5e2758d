"""`moe plan key=value …`: a plan as a table for people, or as one JSON object.

    moe plan model=mixtral_8x7b parallel.expert_parallel_size=8 hardware=h100 hardware.nodes=2 \\
        train.precision=bfloat16 train.sequence_length=4096 train.micro_batch_size=1 train.global_batch_size=256
    moe plan … plan.json=true plan.imbalance=2

Takes every override of `moe train`; docs/plan.md explains the numbers.
"""

from __future__ import annotations

import json
import sys

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from moe.config import DeviceKind, Mlp, PlanConfig, Recompute
from moe.errors import UserError
from moe.plan.counts import count_parameters
from moe.plan.flops import flops_per_token
from moe.plan.gradients import local_tensors
from moe.plan.memory import size
from moe.plan.muon import muon_cost
from moe.plan.run import GB, Plan, make_plan
from moe.plan.traffic import exchange_bytes

WIDTH = 110  # columns where the output is not a terminal
PHASES = {
    "loss": "backward starts",
    "backward": "backward ends",
    "reduce": "reduction",
    "update": "update",
    "evaluate": "evaluation",
    "checkpoint": "checkpoint",
}
KIND_NAMES = {"moe_buffers": "MoE buffers", "recomputed": "recomputed layer", "allocator": "allocator's pool"}


def run_plan(config: PlanConfig, console: Console | None = None) -> None:
    """Prints the plan. Raises UserError, which is the plan's last line, when it doesn't fit."""
    plan = make_plan(config)
    if config.plan.json:
        print(json.dumps(plan.as_dict(), indent=1))
    else:
        if console is None:
            console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=WIDTH)
        traffic = [_traffic(plan)] if any(flow.total for flow in plan.traffic.values()) else []
        console.print(Group(_run(plan), "", _memory(plan), *_memory_notes(plan), "", *traffic, _times(plan)))
        if plan.fits:
            console.print(verdict(plan), soft_wrap=True)
    if not plan.fits:
        sys.stdout.flush()  # the line about it goes to stderr, after the table
        raise UserError(verdict(plan))


def _grid(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _run(plan: Plan) -> Table:
    config, hardware = plan.config, plan.config.hardware
    world, train, parallel = hardware.world_size, config.train, config.parallel
    total, active = count_parameters(config)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    unit = "GPUs" if hardware.device is DeviceKind.cuda else "processes"
    table.add_row(
        "hardware",
        f"{hardware.name}: {hardware.nodes} × {hardware.gpus_per_node} {unit} of {hardware.memory_gb:g} GB, "
        f"links {hardware.intra_node_gbytes_per_s:g} GB/s inside a node"
        + (f", {hardware.inter_node_gbytes_per_s:g} GB/s between nodes" if hardware.nodes > 1 else ""),
    )
    local = local_tensors(config, world).local
    table.add_row("parameters", f"{total:,}, {active:,} active per token, {local:,} on a rank")
    flops, orthogonalizing = flops_per_token(config), muon_cost(config, world).flops
    whole = flops * train.global_batch_size * train.sequence_length
    muon = (
        f"; Muon {orthogonalizing / 1e12:,.4g} TFLOP a step, {orthogonalizing / whole:.1%} more"
        if orthogonalizing
        else ""
    )
    table.add_row("FLOPs", f"{flops / 1e9:,.4g} GFLOP per token in training{muon}")
    sets = f"expert_parallel_size {parallel.expert_parallel_size}, " if config.model.mlp is Mlp.sparse else ""
    table.add_row(
        "ranks",
        f"{world}, {sets}ZeRO-{parallel.zero_stage}, {train.precision.name}, recompute={config.model.recompute.name}",
    )
    table.add_row(
        "step",
        f"{train.global_batch_size * train.sequence_length:,} tokens = {train.global_batch_size} sequences × "
        f"{train.sequence_length}, {config.accumulation(world)} micro-batches of {train.micro_batch_size} on a rank",
    )
    if plan.note:
        table.add_row("note", plan.note)
    return table


def _memory(plan: Plan) -> Table:
    memory, config = plan.memory, plan.config
    title = f"Memory of a rank, fullest expert rank at {config.plan.imbalance:g} × the mean"
    table = _grid(title, "kind", *(PHASES[phase] for phase in memory.phases))
    for kind in next(iter(memory.phases.values())):
        values = [kinds[kind] for kinds in memory.phases.values()]
        if any(values):
            table.add_row(KIND_NAMES.get(kind, kind), *(size(value) if value else "·" for value in values))
    table.add_section()
    totals = [
        Text(size(memory.total(phase)) + (" ← peak" if phase == memory.peak_phase else ""), style="bold")
        for phase in memory.phases
    ]
    table.add_row(Text("together", style="bold"), *totals)
    return table


def _worth(plan: Plan, kind: Recompute) -> str:
    """What recomputing saves for what it costs: bytes for each MFLOP."""
    flops, saved = plan.recomputed_flops[kind], plan.recomputing[Recompute.none] - plan.recomputing[kind]
    return f" ({saved / (flops / 1e6):,.0f} bytes saved per MFLOP)" if flops else ""


def _memory_notes(plan: Plan) -> list[str]:
    memory, hardware = plan.memory, plan.config.hardware
    kept = ", ".join(f"{kind.name} {size(count)}{_worth(plan, kind)}" for kind, count in plan.recomputing.items())
    notes = [f"activations and MoE buffers with model.recompute = {kept}"]
    if memory.host or memory.checkpoint_host:
        ranks = hardware.gpus_per_node
        always = f"{size(ranks * memory.host)} for the optimizer and " if memory.host else ""
        saving = size(ranks * memory.checkpoint_host)
        notes.append(f"host memory of a node: {always}{saving} while saving, of {hardware.host_memory_gb:g} GB")
    return notes


def _traffic(plan: Plan) -> Table:
    table = _grid("Sent by a rank per step", "what", "inside the node", "between nodes")
    for name, flow in plan.traffic.items():
        if flow.total:
            table.add_row(name, *(size(count) if count else "·" for count in (flow.intra, flow.inter)))
    table.add_section()
    sums = (sum(flow.intra for flow in plan.traffic.values()), sum(flow.inter for flow in plan.traffic.values()))
    table.add_row(Text("together", style="bold"), *(Text(size(count), style="bold") for count in sums))
    return table


def _times(plan: Plan) -> Group:
    """Of links at their stated rates, to slower ones."""
    train, hardware = plan.config.train, plan.config.hardware
    tokens = train.global_batch_size * train.sequence_length
    table = _grid("Time of a step", "bound", "seconds", "tokens/s")
    for name, part in (
        ("arithmetic", "compute"),
        ("update", "update"),
        ("links inside a node", "intra"),
        ("links between nodes", "inter"),
        ("expert exchange on them", "exchange"),
    ):
        if getattr(plan.times, part):
            table.add_row(name, _range(*(f"{getattr(times, part):.3g}" for times in (plan.times, plan.slow_times))), "")
    table.add_section()
    for name, bound in (("everything overlaps", "overlapped"), ("nothing overlaps", "in_turn")):
        best, slow = (getattr(times, bound) for times in (plan.times, plan.slow_times))
        rates = _range(*(f"{tokens / seconds:,.0f}" for seconds in (slow, best)))
        table.add_row(Text(name, style="bold"), _range(f"{best:.3g}", f"{slow:.3g}"), rates)
    if not plan.times.intra + plan.times.inter:
        return Group(table)
    line = f"ranges: links at their stated rates, to links at {hardware.link_efficiency:g} of them"
    if calls := exchange_bytes(plan.config, hardware.world_size).calls:
        line = (
            f"{line}, {hardware.exchange_latency_us:g} µs for each of {calls:,} all-to-alls,\n"
            f"and the fullest expert rank's rows at {plan.config.plan.imbalance:g} × the mean"
        )
    return Group(table, line)


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def verdict(plan: Plan) -> str:
    """One line: it fits, or what it needs and which changes were tried and fit."""
    hardware, needed = plan.config.hardware, plan.needed_gb
    parts = f"{plan.memory.peak / GB:.3g} GB of the run, {hardware.reserved_gb:g} GB reserved"
    if plan.fits:
        return f"fits: needs {needed:.3g} of {hardware.memory_gb:g} GB ({parts})"
    if needed > hardware.memory_gb:
        line = f"does not fit: needs {needed:.3g} of {hardware.memory_gb:g} GB ({parts})"
    else:
        line = (
            f"does not fit: saving needs {plan.host_gb:.3g} of a node's {hardware.host_memory_gb:g} GB of host memory"
        )
    if plan.advice:
        return f"{line}; try {', '.join(plan.advice)}: needs {plan.advised_gb:.3g} GB"
    return f"{line}; no expert_parallel_size, micro-batch, recomputation, precision or number of nodes was found to fit"
