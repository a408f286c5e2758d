"""Adapters: what a fine-tuning run trains beside the frozen weights of `init_from`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

from moe.config.choices import AdapterKind
from moe.config.rules import default_of, positive, require, share
from moe.errors import UserError

# Linear layers by the last part of their name; `gate` is the router and `experts` are a sparse layer's stacked experts.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate", "experts")
WITH_DROPOUT = ("q_proj", "k_proj", "v_proj", "o_proj")
MAX_RANK = 4096
NAMES_SHOWN = 12


def fits(pattern: str, name: str) -> bool:
    """Whether a module's whole name is meant: by its last parts, as peft reads `target_modules`, or as a pattern."""
    return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)


def fits_parameter(pattern: str, name: str) -> bool:
    """Whether a parameter is meant, by its own name or its module's."""
    return fits(pattern, name) or fits(pattern, name.rpartition(".")[0])


@dataclass(kw_only=True, slots=True)
class AdapterConfig:
    """LoRA (arXiv 2106.09685): a target W computes with W + s·B·A, where only A [r, in] and B [out, r] train and
    s = lora_alpha / r, or lora_alpha / √r with `use_rslora` (arXiv 2312.03732). Names are peft's.

    `target_modules` are names of linear layers, `gate` (the router) and `experts` (an A and a B for each expert), or
    patterns of whole names as in `model.layers.0.*`; `rank_pattern` gives other ranks, {pattern: r}. `modules_to_save`
    are patterns of parameters that train in full. `lora_dropout` is that of the attention projections' inputs to A.
    With `use_dora` (arXiv 2402.09353) attention projections also train the length of each row of W + s·B·A.
    """

    kind: AdapterKind = AdapterKind.none
    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "experts"])
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        positive("adapter", self, "r", at_most=MAX_RANK)
        positive("adapter", self, "lora_alpha")
        share("adapter", self, "lora_dropout")
        if self.kind is AdapterKind.none:
            self._require_unused()
            return
        require(
            bool(self.target_modules),
            f"adapter.target_modules=[] must name what is adapted: {', '.join(TARGETS)}, or patterns of whole names",
        )
        for name in self.target_modules:
            require(
                name in TARGETS or any(sign in name for sign in ".*?["),
                f"adapter.target_modules={name}: must be one of {', '.join(TARGETS)}, or a pattern of whole names as "
                "in 'model.layers.0.*'",
            )
        for pattern, rank in self.rank_pattern.items():
            require(
                isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= MAX_RANK,
                f"adapter.rank_pattern.{pattern}={rank} must be a whole number from 1 to {MAX_RANK}",
            )

    def _require_unused(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            require(
                value == default_of(self, one.name),
                f"adapter.{one.name}={str(value).lower()} is read with an adapter only: add adapter=lora",
            )

    @property
    def trains_adapter(self) -> bool:
        return self.kind is not AdapterKind.none

    def require_targets(self, modules: Collection[str]) -> None:
        """Raises UserError for a pattern that fits none of a model's modules that can have an adapter."""
        stated = {f"adapter.target_modules={one}": one for one in self.target_modules}
        stated |= {f"adapter.rank_pattern.{one}={rank}": one for one, rank in self.rank_pattern.items()}
        for key, pattern in stated.items():
            require(
                any(fits(pattern, name) for name in modules),
                f"{key}: no module of this model fits; it has "
                f"{', '.join(sorted({name.rpartition('.')[2] for name in modules}))}",
            )

    def saved_in_full(self, parameters: Sequence[str], adapted: Collection[str]) -> list[str]:
        """Those of a model's parameters that `modules_to_save` means. Raises UserError for a pattern that fits none,
        and for a parameter that has an adapter."""
        saved = []
        for pattern in self.modules_to_save:
            found = [name for name in parameters if fits_parameter(pattern, name)]
            require(
                bool(found),
                f"adapter.modules_to_save={pattern}: no parameter of this model fits; its names are like "
                f"{', '.join(parameters[:NAMES_SHOWN])}",
            )
            for name in found:
                if name in adapted:
                    targets = next(target for target in self.target_modules if fits_parameter(target, name))
                    raise UserError(
                        f"adapter.modules_to_save={pattern}: {name} has an adapter, by "
                        f"adapter.target_modules={targets}: leave it out of one of the two"
                    )
            saved += found
        return saved

    def adapts(self, module: str) -> bool:
        """Whether the module of this whole name gets an adapter."""
        return any(fits(pattern, module) for pattern in self.target_modules)

    def rank_of(self, module: str) -> int:
        return next((rank for pattern, rank in self.rank_pattern.items() if fits(pattern, module)), self.r)

    def scale(self, rank: int) -> float:
        """s of an adapter of this rank."""
        return self.lora_alpha / (rank**0.5 if self.use_rslora else rank)
