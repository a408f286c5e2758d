"""Weights, gradients and optimizer state as DeepSpeed's ZeRO-1 and 2 hold them on a rank (moe/engine/deepspeed), or as
the plain engine does (moe/engine/plain.py).

In bytes per parameter on this rank. c is the rank's share of ZeRO's partition: 1 / ranks for shared weights,
expert_parallel_size / ranks for experts. The second column is precision, device, ZeRO stage.

| way      | when                                 | weights | master  | Adam | flat gradient | gradients           |
| in place | float32 on a CPU, 1, no expert ranks | 4       | shared  | 8c   | –             | 4, reduced in place |
| bucket   | float32 on a CPU, 1, expert ranks    | 4       | shared  | 8c   | –             | 4, a bucket, 4c     |
| bucket   | float32 on CUDA, 1                   | 4       | 4c      | 8c   | 4c            | 4, a bucket, 4c     |
| stage 2  | float32, 2                           | 4       | as in 1 | 8c   | as in 1       | a bucket of 4, 4c   |
| stage 2  | bfloat16, 2                          | 2       | 4c      | 8c   | 4c            | a bucket of 2, 4c   |
| sums     | bfloat16 on a CPU, 1                 | 2       | 4c      | 8c   | –             | 4 until the update  |
| sums     | bfloat16 on CUDA, 1                  | 2       | 4c      | 8c   | –             | 4 all the time      |
| plain    | engine=plain, float32                | 4       | shared  | 8    | –             | 4                   |
| plain    | engine=plain, bfloat16               | 2       | 4       | 8    | –             | 4                   |

With `optim=muon` a matrix that Muon updates has one moment: 4 bytes in place of 8.

On a CPU a float32 run's master weights are the model's own, and AdamW reads gradients where they are
(moe/engine/deepspeed/shortcuts.py); elsewhere, and for Muon, a flat gradient exists during the update.

With `parallel.offload_optimizer` master weights, Adam's moments and the reduced gradients are in the host's memory, and
stage 1 uses a bucket. A bucket has 500 million elements and is copied to be reduced; on CUDA it takes its whole size,
on a CPU only the pages that are written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe.config import Config, EngineKind, Precision
from moe.plan.counts import parameter_parts
from moe.plan.muon import muon_cost
from moe.plan.trained import routed_experts, trained_shapes, trains_all

BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size
EXPERT_GROUP = 178_956_971  # elements: the size of the parameter groups into which DeepSpeed splits experts


@dataclass(frozen=True, slots=True)
class MemoryBlock:
    """Bytes of one kind of memory; `piece` is the size of the largest single tensor among them."""

    kind: str
    size: int
    piece: int


def flat(kind: str, size: float) -> list[MemoryBlock]:
    """A block that is one tensor."""
    return [MemoryBlock(kind, round(size), round(size))]


def element_size(config: Config) -> int:
    """Bytes of one weight or activation in the dtype that the model computes in."""
    return 2 if config.train.precision is Precision.bfloat16 else 4


@dataclass(frozen=True, slots=True)
class Tensors:
    """The rank's parameters, in elements: those on all ranks, its experts, and its share of ZeRO's partition."""

    shared: int
    experts: int
    share: float
    sizes: tuple[tuple[int, int], ...]  # (how many, elements of one)

    @property
    def local(self) -> int:
        return self.shared + self.experts

    @property
    def largest(self) -> int:
        return max((size for _, size in self.sizes), default=0)


def local_tensors(config: Config, world_size: int) -> Tensors:
    parts, model, expert = parameter_parts(config), config.model, config.parallel.expert_parallel_size
    hidden, layers, experts = model.hidden_size, model.num_hidden_layers, parts.experts // expert
    sizes = [(1 if model.tie_word_embeddings else 2, parts.embedding), (2 * layers + 1, hidden)]
    sizes += [
        (2 * layers, heads * model.head_size * hidden)
        for heads in (model.num_attention_heads, model.num_key_value_heads)
    ]
    sparse = len(model.sparse_layer_numbers)
    if sparse:
        down = experts // sparse // 3
        sizes += [(sparse, 2 * down), (sparse, down), (sparse, config.router.num_parameters(hidden))]
        sizes += [(3 * sparse, hidden * model.shared_size)] if model.shared_size else []
    if layers > sparse:
        sizes += [(3 * (layers - sparse), hidden * model.intermediate_size)]
    share = parts.shared / world_size + experts / (world_size // expert)
    return Tensors(parts.shared, experts, share, tuple(sizes))


def trained_tensors(config: Config, world_size: int) -> Tensors:
    """Of the parameters that train: those that have gradients and optimizer state."""
    if trains_all(config):
        return local_tensors(config, world_size)
    expert_size, sizes, shared, experts = config.parallel.expert_parallel_size, [], 0, 0
    for name, shape in trained_shapes(config).items():
        size = math.prod(shape)
        if routed_experts(name):
            size //= expert_size
            experts += size
        else:
            shared += size
        sizes.append((1, size))
    share = shared / world_size + experts / (world_size // expert_size)
    return Tensors(shared, experts, share, tuple(sizes))


class Sharded:
    """Weights, gradients and optimizer state in each phase of a step."""

    def __init__(self, config: Config, world_size: int, device: str) -> None:
        self.tensors, self.cuda = trained_tensors(config, world_size), device == "cuda"
        self.muon = muon_cost(config, world_size, device=device)
        self.weights = local_tensors(config, world_size).local + (
            self.tensors.local if config.adapter.trains_adapter else 0
        )
        self.expert, self.offload = config.parallel.expert_parallel_size, config.parallel.offload_optimizer
        self.half = config.train.precision is Precision.bfloat16
        self.size = element_size(config)
        self.several = config.accumulation(world_size) > 1
        if config.engine is EngineKind.plain:
            self.way = "plain"
        elif config.parallel.zero_stage == 2:
            self.way = "stage 2"
        elif self.offload:
            self.way = "bucket"
        elif self.half:
            self.way = "sums"
        else:
            self.way = "bucket" if self.cuda or self.expert > 1 else "in place"
        whole = (
            0 if self.half or world_size == 1 else self.tensors.largest
        )  # float32 keeps whole tensors that overlap the partition
        self.partition = 0 if self.offload else round(4 * min(self.tensors.local, self.tensors.share + whole))

    def always(self) -> list[MemoryBlock]:
        blocks = flat("weights", self.size * self.weights)
        if self.way == "plain":  # moments, and in bfloat16 master weights
            each = 12 if self.half else 8
            moments = each * self.tensors.local - 4 * self.muon.local
            blocks.append(MemoryBlock("optimizer", moments, 4 * self.tensors.largest))
        elif not self.offload:  # moments, and master weights where they aren't the model's own
            shared = 0 if self.half or self.cuda else round(4 * self.tensors.share)
            blocks.append(MemoryBlock("optimizer", self.saved - shared, round(4 * self.tensors.share)))
        return [*blocks, *self._sums(always=True)]

    @property
    def has_all_sums(self) -> bool:
        """Whether memory for all gradients is there before a step's last backward pass."""
        return self.way == "sums" and (self.cuda or self.several)

    @property
    def trims_heap(self) -> bool:
        """Whether a backward pass gives back the memory that it frees."""
        return self.way == "sums" and not self.cuda

    @property
    def saved(self) -> int:
        """Bytes of the rank's share of a checkpoint: float32 weights and moments, of which Muon has one."""
        return round(12 * self.tensors.share - 4 * self.muon.share)

    def host(self) -> int:
        """Bytes of host memory with offloading: pinned master weights, moments, gradients and updated weights."""
        return round((16 + self.size) * self.tensors.share) if self.offload else 0

    def held(self) -> list[MemoryBlock]:
        """Gradients between the micro-batches of a step."""
        if not self.several:
            return []
        if self.way == "sums":
            return self._sums()
        return flat("gradients", self.partition) if self.way == "stage 2" else self._each(4)

    def starting(self) -> list[MemoryBlock]:
        """At the first gradient of a backward pass, which allocates the bucket."""
        return self._bucket() if self.cuda and self.way in ("stage 2", "bucket") else []

    def produced(self) -> list[MemoryBlock]:
        """At the end of the step's last backward pass."""
        if self.way == "stage 2":
            return [*self._bucket(), *self.held()]
        if self.way == "sums":  # a bfloat16 gradient is freed once it has been added
            return [*self._sums(), *flat("gradients", 2 * self.tensors.largest)]
        if self.way == "plain" and self.half:
            return [*self._each(4), *flat("gradients", 2 * self.tensors.largest)]
        return [*self._each(4), *self.starting()]

    def reducing(self) -> list[MemoryBlock]:
        if self.way in ("in place", "plain"):
            return self._each(4)
        if self.way == "sums":
            return [*self._sums(), *flat("communication", self._copy_of_sums())]
        # shared weights and experts are reduced in different groups, one after the other
        group = self.tensors.local if self.expert == 1 else max(self.tensors.shared, self.tensors.experts)
        copy = min(BUCKET, group) * (6 if self.half and self.way == "stage 2" else 4)  # bfloat16, and widened
        bucket_and_copy = [*self._bucket(), *flat("communication", copy)]
        rest = max(0, self.tensors.local - BUCKET)
        if self.way == "bucket":  # gradients that wait for the next bucket are still separate tensors
            return [*bucket_and_copy, *flat("gradients", 4 * rest)]
        # bfloat16 adds to one float32 partition; float32 fills a new one after freeing the reduction's copy
        partitions = 1 if self.half else (1 if self.several else 0) + (1 if rest else 0)
        return [*bucket_and_copy, *flat("gradients", partitions * self.partition)]

    def updating(self) -> list[MemoryBlock]:
        copied = not (self.half or self.cuda or self.way == "plain")  # the flat gradient, which AdamW doesn't need
        muon = flat("working", self.muon.working + (round(4 * self.muon.share) if copied else 0))
        if self.way in ("sums", "in place", "plain"):
            return [*(self._sums() if self.way == "sums" else self._each(4)), *muon]
        working = 0
        if self.half or self.cuda:  # first a float64 copy of one gradient for the norm, then the flat gradient
            working = max(8 * self.tensors.largest, 0 if self.offload else round(4 * self.tensors.share))
        return [*flat("gradients", self.partition), *flat("working", working), *muon]

    def _sums(self, always: bool = False) -> list[MemoryBlock]:
        """The float32 sums of bfloat16 gradients: CUDA always has them, a CPU from a step's first gradient to its
        update."""
        return flat("gradients", 4 * self.tensors.local) if self.way == "sums" and always == self.cuda else []

    def _each(self, size: int) -> list[MemoryBlock]:
        """A tensor for each parameter, `size` bytes an element."""
        return [MemoryBlock("gradients", size * count * one, size * one) for count, one in self.tensors.sizes]

    def _bucket(self) -> list[MemoryBlock]:
        size = self.size if self.way == "stage 2" else 4
        return flat("communication", size * (BUCKET if self.cuda else min(BUCKET, self.tensors.local)))

    def _copy_of_sums(self) -> int:
        """A flat gradient sum alone in its bucket is reduced in place; several are first copied into one buffer."""
        shared = self.tensors.local if self.expert == 1 else self.tensors.shared
        experts = 0 if self.expert == 1 else self.tensors.experts
        joined = min(experts, BUCKET + EXPERT_GROUP) if experts > EXPERT_GROUP else 0
        return 4 * max(shared if shared <= BUCKET else 0, joined)
