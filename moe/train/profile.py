"""`moe train profile=true`: where the time of a few training steps goes.

torch.profiler records the operations of steps 5 to 8 of this process, on every rank. Each operation's own time counts
for one part of the model. Forward, the part is that of the innermost module with a part. Backward, autograd numbers
each node as the operation that made it: the part is that operation's. On a GPU, the time of the kernels that an
operation launches is counted beside its time on the host.

Written to RUN/profile/: trace.json (of several ranks trace_rank0.json, …), which https://ui.perfetto.dev opens, and
parts.csv. The profiler itself takes time: the profiled steps are slower than the others.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from moe.config.run import PROFILED
from moe.distributed.mesh import Mesh
from moe.engine.base import Engine
from moe.model.attention import Attention
from moe.model.mlp import DenseMLP
from moe.model.transformer import Decoder, Transformer
from moe.sparse import Router, SparseMLP
from moe.sparse.experts import Experts

FOLDER = "profile"
# What each part is, in the table's order.
PARTS = {
    "attention": "projections, rotation and attention",
    "router": "scores, choice and balance statistics",
    "dispatch": "sorting, gathering and combining rows, and waiting for the counts of an exchange",
    "exchange": "rows sent to and from the experts' ranks",
    "experts": "products and activation of the routed experts",
    "mlp": "dense and shared feed-forward",
    "norms": "normalisations",
    "loss": "the head's product and the cross-entropy",
    "gradients": "adding gradients up over micro-batches and ranks",
    "optimizer": "norm, clipping and update",
    "data wait": "waiting for the next batch",
    "other": "embedding, residual sums, balance losses, metrics",
}
_RANGE = "moe: "
_NODE = "autograd::engine::evaluate_function: "
_MODULES: tuple[tuple[type[nn.Module], str], ...] = (
    (Attention, "attention"),
    (Router, "router"),
    (Experts, "experts"),
    (SparseMLP, "dispatch"),
    (DenseMLP, "mlp"),
    (Decoder, "other"),
    (Transformer, "loss"),  # outside of its decoder
)


def in_part(name: str) -> AbstractContextManager[Any]:
    """What runs inside counts for this part, unless a module inside has a part of its own."""
    return record_function(_RANGE + name)


@dataclass(slots=True)
class PartTimes:
    """Milliseconds by part over all profiled steps: of the host's thread, and of the device's kernels."""

    host: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    device: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


def _part_of(module: nn.Module, name: str) -> str | None:
    if name.endswith("norm"):
        return "norms"
    return next((part for kind, part in _MODULES if isinstance(module, kind)), None)


class PartRanges:
    """While it is there, modules' forward passes and the engine's backward pass and step are ranges of their part."""

    def __init__(self, engine: Engine) -> None:
        self._handles: list[Any] = []
        self._wrapped: list[tuple[Any, str]] = []
        for name, module in engine.model.named_modules():
            if (part := _part_of(module, name)) is not None:
                self._hook(module, part)
            if isinstance(module, SparseMLP):  # whose steps a block may call instead of its forward pass
                self._wrap(module, dict.fromkeys(("route", "dispatch", "compute", "combine"), "dispatch"))
        self._wrap(engine, {"backward": "gradients", "step": "optimizer"})

    def _wrap(self, owner: Any, methods: dict[str, str]) -> None:
        for method, part in methods.items():
            setattr(owner, method, _inside(part, getattr(owner, method)))
            self._wrapped.append((owner, method))

    def _hook(self, module: nn.Module, part: str) -> None:
        entered: list[Any] = []

        def enter(*_: object) -> None:
            entered.append(in_part(part))
            entered[-1].__enter__()

        def leave(*_: object) -> None:
            entered.pop().__exit__(None, None, None)

        self._handles.append(module.register_forward_pre_hook(enter))
        self._handles.append(module.register_forward_hook(leave, always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for owner, method in self._wrapped:
            delattr(owner, method)  # the class's own again


def _inside(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def ranged(*arguments: Any, **keywords: Any) -> Any:
        with in_part(part):
            return method(*arguments, **keywords)

    return ranged


def times_by_part(events: Iterable[Any]) -> PartTimes:
    """Every operation's own time, added to its part. `events` are torch.profiler's."""
    times = PartTimes()
    for event, part, _ in attributed(events):
        times.host[part] += event.self_cpu_time_total / 1e3
        times.device[part] += event.self_device_time_total / 1e3
    return times


def attributed(events: Iterable[Any]) -> Iterator[tuple[Any, str, bool]]:
    """(event, its part, whether it is of the backward pass) of every event on the host. `events` are
    torch.profiler's."""
    on_host = [event for event in events if event.device_type.name == "CPU"]
    # Part of the operation that made the node with this number. Operations that make none have the number of the next
    # node, so the last operation with a number made it.
    made_in: dict[int, str] = {}
    for event in on_host:
        if event.sequence_nr >= 0 and (part := _range_around(event)):
            made_in[event.sequence_nr] = part
    for event in on_host:
        yield event, *_attributed(event, made_in)


def _range_around(event: Any) -> str | None:
    """The part of the innermost range; None in the backward pass."""
    while event is not None and not event.name.startswith(_NODE):
        if event.name.startswith(_RANGE):
            return event.name.removeprefix(_RANGE)
        event = event.cpu_parent
    return None


def _attributed(event: Any, made_in: dict[int, str]) -> tuple[str, bool]:
    """The part, and whether a node of the backward pass is around the event."""
    exchanged = False
    while event is not None:
        if "AllToAll" in event.name or "alltoall" in event.name or "all_to_all" in event.name:
            exchanged = True
        if event.name.startswith(_RANGE):
            return "exchange" if exchanged else event.name.removeprefix(_RANGE), False
        if event.name.startswith(_NODE):
            return "exchange" if exchanged else made_in.get(event.sequence_nr, "gradients"), True
        event = event.cpu_parent
    return "exchange" if exchanged else "other", False


class StepProfiler:
    """Profiles steps `PROFILED` of those that it is called for."""

    def __init__(self, engine: Engine, mesh: Mesh, folder: Path, say: Callable[[str], None]) -> None:
        self._engine, self._mesh, self._folder, self._say = engine, mesh, folder / FOLDER, say
        self._seen = 0
        self._profile: profile | None = None
        self._ranges: PartRanges | None = None
        self._metrics: list[dict[str, Any]] = []

    def step(self) -> AbstractContextManager[Any]:
        """Around each step."""
        self._seen += 1
        if self._seen == PROFILED.start:
            activities = [ProfilerActivity.CPU]
            if self._mesh.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._ranges = PartRanges(self._engine)
            self._profile = profile(activities=activities)
            self._profile.start()
        return in_part("other") if self._profile is not None else nullcontext()

    def end(self, metrics: dict[str, Any]) -> None:
        """After each step, with its metrics. After the last profiled one writes the files and prints the table: a
        collective. Raises OSError."""
        if self._profile is None or self._ranges is None:
            return
        self._metrics.append(metrics)
        if self._seen < PROFILED.stop - 1:
            return
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize(self._mesh.device)
        self._profile.stop()
        self._ranges.remove()
        profiled, self._profile = self._profile, None
        self._mesh.agree(lambda: self._write_trace(profiled), "profile")
        ranks = self._mesh.gather(times_by_part(profiled.events() or []))
        if self._mesh.is_main:
            self._write_parts(ranks)
            for line in table(ranks, len(PROFILED), self._metrics):
                self._say(line)
            self._say(f"profile: {self._folder}")

    def _write_trace(self, profiled: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        mesh = self._mesh
        name = "trace.json" if mesh.world_size == 1 else f"trace_rank{mesh.rank}.json"
        profiled.export_chrome_trace(str(self._folder / name))

    def _write_parts(self, ranks: list[PartTimes]) -> None:
        with (self._folder / "parts.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["rank", "part", "host_ms_per_step", "device_ms_per_step"])
            for rank, times in enumerate(ranks):
                for part in PARTS:
                    each = (times.host[part] / len(PROFILED), times.device[part] / len(PROFILED))
                    writer.writerow([rank, part, *(f"{milliseconds:.3f}" for milliseconds in each)])


def table(ranks: list[PartTimes], steps: int, metrics: list[dict[str, Any]]) -> list[str]:
    """Lines: milliseconds a step by part, means over the ranks, and the profiled steps' MFU and data wait."""
    kinds = {"host": [times.host for times in ranks]}
    if any(sum(times.device.values()) for times in ranks):
        kinds["device"] = [times.device for times in ranks]
    lines = [f"{'part':10}" + "".join(f"{f'{kind} ms':>12}{'share':>8}" for kind in kinds)]
    totals = {kind: sum(sum(one.values()) for one in counted) for kind, counted in kinds.items()}
    for part, what in PARTS.items():
        spent = {kind: sum(one[part] for one in counted) for kind, counted in kinds.items()}
        if any(spent.values()):
            cells = (
                f"{spent[kind] / steps / len(ranks):12.2f}{100 * spent[kind] / max(totals[kind], 1e-9):7.1f}%"
                for kind in kinds
            )
            lines.append(f"{part:10}{''.join(cells)}  {what}")
    means = {name: sum(one[name] for one in metrics) / len(metrics) for name in ("step_seconds", "mfu", "data_wait")}
    lines.append(
        f"a profiled step: {1e3 * means['step_seconds']:.0f} ms, MFU {means['mfu']:.1%}, data wait "
        f"{means['data_wait']:.1%}"
    )
    return lines
