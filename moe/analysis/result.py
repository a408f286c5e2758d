"""Everything that an analysis measured, and on what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe.analysis.assignment import Assignment
from moe.analysis.favourites import Favourite, TokenContext
from moe.analysis.information import Information
from moe.analysis.leave_out import LeaveOut
from moe.analysis.observe import Observed
from moe.analysis.repetition import Repetition
from moe.analysis.similarity import Similarity
from moe.checkpoint.layout import CHECKPOINTS
from moe.config import AnalyzeConfig
from moe.data.corpus import Corpus

PAGE_EXPERTS = 600  # of all layers that the page shows


@dataclass(slots=True)
class Analysis:
    """`leave_out` is None where it wasn't measured, for the reason `why_not_left_out`."""

    checkpoint: Path
    step: int
    corpus: Corpus
    settings: AnalyzeConfig
    observed: Observed
    assignment: list[Assignment]
    repetition: list[Repetition]
    information: list[Information]
    favourites: list[Favourite]
    contexts: list[TokenContext]
    similarity: list[Similarity]
    leave_out: LeaveOut | None
    why_not_left_out: str

    @property
    def run(self) -> Path:
        """The run directory of the checkpoint, or itself where it is a model alone."""
        above = self.checkpoint.resolve().parent
        return above.parent if above.name == CHECKPOINTS else self.checkpoint

    def shown_layers(self) -> list[int]:
        """The layers that the page shows one at a time: all, or so many evenly spaced ones, the last included, that
        their tables and matrices of experts leave it small."""
        layers = self.observed.layers
        costs = [max(layer.num_experts, layer.num_experts**2 // 64) for layer in layers]
        for stride in range(1, len(layers) + 1):
            kept = range((len(layers) - 1) % stride, len(layers), stride)
            if sum(costs[index] for index in kept) <= PAGE_EXPERTS or stride == len(layers):
                return [layers[index].layer for index in kept]
        return []

    def loss_of(self, source: int) -> float:
        """Nats per token of one source's sequences; NaN where it has none."""
        of_B = self.observed.sources_B == source
        targets = int(self.observed.targets_B[of_B].sum())
        return float(self.observed.nats_B[of_B].sum() / targets) if targets else float("nan")
