"""`moe analyze`: which checkpoint, on which text, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from moe.config.data import DataConfig
from moe.config.rules import is_seed, not_negative, positive, require


@dataclass(kw_only=True, slots=True)
class AnalyzeSettings:
    """How much text is routed, and how much is computed with it.

    `sequences` of the run's sequence length are read, divided equally among the sources, but at most `tokens` tokens.
    An expert's worth takes a pass without it over some of them, for each expert of each layer: at most
    `leave_out_tokens` in all (0: not measured). Each test makes `permutations`; the page shows `text_tokens` of each
    source.
    """

    sequences: int = 96
    tokens: int = 65_536
    leave_out_tokens: int = 300_000
    permutations: int = 100
    text_tokens: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        positive("analyze", self, "sequences", "tokens", "text_tokens")
        not_negative("analyze", self, "leave_out_tokens")
        positive("analyze", self, "permutations", at_most=100_000)
        is_seed("analyze", self, "seed")
        require(self.sequences > 1, "analyze.sequences=1 must be ≥ 2: errors are estimated between sequences")


@dataclass(kw_only=True, slots=True)
class AnalyzeConfig:
    """`checkpoint` is a run directory or one of its checkpoints; without a source in `data`, its held-out text is used.

    `check_memory=false` loads a model that is larger than the memory there is. `train` is what presets of `data` say
    about training, such as a prompt; nothing reads it.
    """

    checkpoint: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    analyze: AnalyzeSettings = field(default_factory=AnalyzeSettings)
    check_memory: bool = True
    train: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(bool(self.checkpoint.strip()), "checkpoint='' must name a run directory or one of its checkpoints")
        default = DataConfig()
        for name in ("held_out", "format", "text_field"):
            value = getattr(self.data, name)
            require(
                bool(self.data.all_sources()) or value == getattr(default, name),
                f"data.{name}={getattr(value, 'name', value)} needs a source: add data=NAME or data.path=…, or leave "
                "it out for the run's own held-out text",
            )

    def text_of(self, run: DataConfig) -> DataConfig:
        """The text to route: the stated one, or that of the checkpoint's run."""
        if self.data.all_sources():
            return self.data
        default = DataConfig().cache_dir
        return run if self.data.cache_dir == default else replace(run, cache_dir=self.data.cache_dir)
