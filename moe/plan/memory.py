"""A rank's memory in each phase of an optimizer step. The phase that needs most is the peak, which must fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moe.config import Config
from moe.plan.activations import Shapes, evaluation_memory, head_memory, kept_by_layers, layer_backward
from moe.plan.gradients import MemoryBlock, Sharded, flat
from moe.plan.trained import HEADS, trained_shapes, trains_all

KINDS: tuple[str, ...] = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "moe_buffers",
    "recomputed",
    "communication",
    "working",
    "allocator",
)
STEP = ("loss", "backward", "reduce", "update")  # the phases of a step, which repeat
# On a CPU, glibc returns freed blocks of at least GIVEN_BACK bytes to the system; smaller ones stay with the process,
# except where the backward pass trims the heap (`Sharded.trims_heap`).
# Gradients can't reuse the gaps that freed activations leave, because router outputs between them stay allocated: both
# pools count in full. Short-lived blocks between long-lived ones need additional room: HOLES, as a share of their size,
# is fitted to runs with glibc (docs/plan.md says to which, and how well it holds).
GIVEN_BACK = 32 * 2**20
CHECKPOINT_FILE = 2 << 30  # `moe.checkpoint.ownership` cuts files up to this size
HOLES = {"working": 1.0, "recomputed": 1.0}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one rank: {phase: {kind: bytes}} on the device, in the order of a step. Of host memory the run always
    uses `host`, and a save `checkpoint_host` more (on a CPU `phases` has both)."""

    phases: dict[str, dict[str, int]]
    host: int
    checkpoint_host: int

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.peak_phase)

    def fullest_step(self) -> dict[str, int]:
        """{kind: bytes} of the phase that needs most, evaluation and checkpoint left out."""
        return self.phases[max(STEP, key=self.total)]

    @property
    def step_peak(self) -> int:
        return sum(self.fullest_step().values())


def plan_memory(config: Config, world_size: int, *, device: str = "cpu", imbalance: float = 1.0) -> MemoryPlan:
    """`device` is cpu or cuda; `imbalance` ≥ 1 is `plan.imbalance`.

    NOTE: assumes one document per sequence and no dropped choices; dropout's masks are not counted.
    """
    shapes, sharded = Shapes(config, device, imbalance), Sharded(config, world_size, device)
    always, held = sharded.always(), sharded.held()
    phases = {
        "loss": [*always, *held, *sharded.starting(), *_backward_starts(shapes, sharded)],
        "backward": [*always, *sharded.produced(), *kept_by_layers(shapes, 1), *layer_backward(shapes)],
        "reduce": [*always, *sharded.reducing()],
        "update": [*always, *sharded.updating()],
        "evaluate": [*always, *flat("working", evaluation_memory(shapes))],
    }
    saved = sharded.saved  # a file is assembled in memory before it is written
    file = min(saved, CHECKPOINT_FILE)
    if device == "cpu":
        beside = max(map(phases.__getitem__, STEP), key=_size) if config.checkpoint.background else always
        snapshot = [MemoryBlock("working", saved, 4 * sharded.tensors.largest), MemoryBlock("working", file, file)]
        phases["checkpoint"] = [*beside, *snapshot]
    host = 0 if device == "cpu" else saved + file
    return MemoryPlan(dict(_by_kind(phases, sharded, shapes.sparse)), sharded.host(), host)


def _size(blocks: list[MemoryBlock]) -> int:
    return sum(block.size for block in blocks)


def estimate_memory(config: Config, world_size: int, device: str = "cpu") -> dict[str, int]:
    """{kind: bytes} per rank in the phase of a training step that needs most, with balanced experts."""
    plan = plan_memory(config, world_size, device=device)
    return {kind: size for kind, size in plan.fullest_step().items() if size}


def _backward_starts(shapes: Shapes, sharded: Sharded) -> list[MemoryBlock]:
    """The larger of the loss's own backward pass and that of the last layer, when the loss's gradients are freed."""
    kept, working = head_memory(shapes)
    head, layers = shapes.vocab * shapes.hidden, shapes.config.model.num_hidden_layers
    piece = max(4 * head, shapes.stream)
    loss = [MemoryBlock("activations", kept, piece), MemoryBlock("working", working, piece)]
    head_trains = trains_all(shapes.config) or not {*HEADS}.isdisjoint(trained_shapes(shapes.config))
    of_element = 4 if sharded.way == "sums" else shapes.s
    others = of_element * max(0, sharded.tensors.local - (2 * head if head_trains else 0)) // layers
    arrived = (
        []
        if sharded.has_all_sums
        else [*flat("gradients", of_element * head * head_trains), MemoryBlock("gradients", others, 0)]
    )
    last_layer = [*arrived, *layer_backward(shapes)]
    heavier = max(loss, last_layer, key=_size)
    return [*kept_by_layers(shapes, layers), *heavier]


def _by_kind(
    phases: dict[str, list[MemoryBlock]], sharded: Sharded, sparse: bool
) -> Iterator[tuple[str, dict[str, int]]]:
    """Sums by kind; on a CPU `allocator` is what the process holds in addition: gaps and freed blocks, also those of
    other phases unless the backward pass gives them back."""
    pools = {phase: _pools(blocks, sparse) for phase, blocks in phases.items()}
    gradients = max(pools[phase][0] for phase in STEP)
    others = max(pools[phase][1] for phase in STEP)
    for phase, blocks in phases.items():
        kinds = dict.fromkeys(KINDS, 0)
        for block in blocks:
            kinds[block.kind] += block.size
        if not sharded.cuda:
            others = max(others, pools[phase][1])
            pool = sum(pools[phase]) if sharded.trims_heap else gradients + others
            in_use = sum(block.size for block in blocks if block.piece < GIVEN_BACK)
            kinds["allocator"] = round(pool) - in_use
        yield phase, kinds


def _pools(blocks: list[MemoryBlock], sparse: bool) -> tuple[float, float]:
    """(bytes of small blocks of gradients, bytes of all other small blocks and the gaps between them). In a dense model
    no long-lived blocks lie between the activations: gradients reuse their memory, and all count as one pool."""
    small = [block for block in blocks if block.piece < GIVEN_BACK]
    gradients = sum(block.size for block in small if block.kind == "gradients" and sparse)
    others = [block for block in small if block.kind != "gradients" or not sparse]
    return gradients, sum(block.size * (1 + HOLES.get(block.kind, 0)) for block in others)


def size(count: float) -> str:
    """Bytes as text with three significant digits and a unit."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while abs(count) >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}" if count < 99.95 else f"{count:.0f} {units[0]}"
