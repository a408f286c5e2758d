"""Muon under ZeRO: a rank's partition of a parameter group is a flat tensor that begins and ends inside some matrix.

Muon's momentum is partitioned like Adam's moments. Each rank orthogonalises every matrix of which its partition has a
part, and updates that part alone. Only the matrices at the two ends of a partition are incomplete; one all-to-all of
the partition's ranks brings the rest of them. So a matrix on a boundary is orthogonalised by each of its ranks, and no
rank holds more than its partition and two matrices.

Where a parameter's elements are is read from DeepSpeed's own map from parameters to partitions (`_hp_mapping`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.engine.deepspeed.borrowed import borrow_value, require_meaning
from moe.engine.muon import Muon, Piece

LOST = "Muon would not know which matrices its partition has"


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements [first, end) of a parameter that a rank's partition has from its element `start` on."""

    name: str
    first: int
    end: int
    start: int


@dataclass(frozen=True, slots=True)
class Cut:
    """A matrix of which a rank has only the elements [first, end); they begin at `start` of its partition."""

    matrix: tuple[str, int]  # parameter, and the matrix's place in it
    first: int
    end: int
    start: int


class PartitionedMatrices:
    """`moe.engine.muon.Matrices` of one partition, whose parameters are `names`. Making one is a collective of `group`,
    the partition's ranks. `shapes` are the parameters' matrices', `sizes` the parameters' elements."""

    def __init__(
        self, mine: list[Fragment], shapes: dict[str, tuple[int, int]], sizes: dict[str, int], group: dist.ProcessGroup
    ) -> None:
        self._group = group
        parts: list[list[Fragment]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(parts, mine, group)
        _check_complete(parts, sizes)
        self.names = {part.name for part in chain(*parts)}
        rank = dist.get_rank(group)
        self.pieces: list[Piece] = []
        self._cuts: list[Cut | None] = []  # of each piece
        for part in mine:
            for piece, cut in _pieces(part, shapes[part.name]):
                self.pieces.append(piece)
                self._cuts.append(cut)
        cuts = [[cut for part in of_rank for _, cut in _pieces(part, shapes[part.name]) if cut] for of_rank in parts]
        holders: dict[tuple[str, int], list[tuple[int, Cut]]] = {}
        for holder, of_rank in enumerate(cuts):
            for cut in of_rank:
                holders.setdefault(cut.matrix, []).append((holder, cut))
        others = range(len(parts))
        # What I send to each rank, and what each sends me, in the order of the receiver's cuts.
        self._sent = [
            [have for cut in cuts[to] for holder, have in holders[cut.matrix] if holder == rank and to != rank]
            for to in others
        ]
        self._received = [
            [have for cut in cuts[rank] for holder, have in holders[cut.matrix] if holder == other and other != rank]
            for other in others
        ]
        self._any = any(cuts)

    def completed(self, flat: Tensor) -> list[Tensor]:
        """For each piece of this rank's partition `flat` all elements of its matrices, [N, O, I]. A collective, unless
        no rank's partition ends inside a matrix."""
        whole: dict[tuple[str, int], Tensor] = {}
        for piece, cut in zip(self.pieces, self._cuts, strict=True):
            if cut is not None:
                matrix = whole[cut.matrix] = flat.new_empty(math.prod(piece.shape))
                matrix[cut.first : cut.end] = flat[cut.start : cut.start + cut.end - cut.first]
        if self._any:
            sent = [flat[cut.start : cut.start + cut.end - cut.first] for cuts in self._sent for cut in cuts]
            splits = [
                [sum(cut.end - cut.first for cut in cuts) for cuts in way] for way in (self._sent, self._received)
            ]
            received = flat.new_empty(sum(splits[1]))
            dist.all_to_all_single(
                received, torch.cat(sent) if sent else flat.new_empty(0), splits[1], splits[0], self._group
            )
            start = 0
            for cuts in self._received:
                for cut in cuts:
                    size = cut.end - cut.first
                    whole[cut.matrix][cut.first : cut.end] = received[start : start + size]
                    start += size
        return [
            (flat[piece.start : piece.start + piece.size] if cut is None else whole[cut.matrix]).view(-1, *piece.shape)
            for piece, cut in zip(self.pieces, self._cuts, strict=True)
        ]


def _pieces(part: Fragment, shape: tuple[int, int]) -> list[tuple[Piece, Cut | None]]:
    """The part's matrix that began on another rank, those that are whole, and the one that ends on another rank."""
    size, pieces = math.prod(shape), []
    at = part.first
    while at < part.end:
        index, skip = divmod(at, size)
        whole = (part.end - at) // size * size if skip == 0 else 0
        start = part.start + at - part.first
        if whole:
            pieces.append((Piece(start, whole, shape), None))
            at += whole
            continue
        end = min(part.end, (index + 1) * size)
        cut = Cut((part.name, index), skip, skip + end - at, start)
        pieces.append((Piece(start, end - at, shape, skip), cut))
        at = end
    return pieces


def _check_complete(parts: list[list[Fragment]], sizes: dict[str, int]) -> None:
    """Raises RuntimeError unless the ranks' parts of each parameter are all of it, once."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for part in chain(*parts):
        ranges.setdefault(part.name, []).append((part.first, part.end))
    for name, found in ranges.items():
        ends = [0, *(end for _, end in sorted(found))]
        starts = [*(first for first, _ in sorted(found)), sizes[name]]
        require_meaning(starts == ends, f"have each element of {name} in one rank's partition")


def share_matrices(
    optimizer: Muon, zero: Any, parameters: dict[str, nn.Parameter], shapes: dict[str, tuple[int, int]]
) -> None:
    """Tells `optimizer`, which `zero` (a ZeRO-1/2 optimizer or BF16_Optimizer) has taken, where its matrices are.
    `parameters` are the trained ones; `shapes` is `muon_shapes`. A collective."""
    groups, found = borrow_value(zero, "real_dp_process_group", lost=LOST), set[str]()
    sizes = {name: parameters[name].numel() for name in shapes}
    for index, param_group in enumerate(optimizer.param_groups):
        if not param_group["muon"]:
            continue
        require_meaning(len(param_group["params"]) == 1, "give the optimizer one flat tensor for each parameter group")
        (tensor,) = param_group["params"]
        mine = []
        for name in shapes:
            mapping = borrow_value(parameters[name], "_hp_mapping", lost=LOST)
            if mapping is None or borrow_value(mapping, "param_group_index", lost=LOST) != index:
                continue  # the partition has no element of it
            here = borrow_value(mapping, "hp_fragment_address", lost=LOST)
            there = borrow_value(mapping, "lp_fragment_address", lost=LOST)
            require_meaning(here.numel == there.numel, "map a parameter's elements to as many of a partition")
            mine.append(Fragment(name, there.start, there.start + there.numel, here.start))
        matrices = PartitionedMatrices(mine, shapes, sizes, groups[index])
        optimizer.matrices[tensor] = matrices
        found |= matrices.names
    require_meaning(found == shapes.keys(), "keep each parameter in the group that it was given in")
