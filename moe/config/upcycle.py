"""`moe upcycle`: how many experts each dense layer is turned into, and how they differ at first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moe.config.rules import filled, is_seed, not_negative, positive, require


@dataclass(kw_only=True, slots=True)
class UpcycleConfig:
    """`checkpoint` is a dense model: a run directory, one of its checkpoints, or a Hugging Face folder (`tokenizer` and
    `ignore_keys` as in `moe import`); `run_dir` is a new folder.

    Every expert is a copy of the dense layer (arXiv 2212.05055), and a token's weights sum to 1, so the model computes
    what the dense one does until `noise` or `reinit_ratio` change it. `noise` adds normal noise of that share of each
    matrix's standard deviation. `reinit_ratio` draws that share of each expert's hidden dimensions anew, from a normal
    distribution with the matrix's mean and deviation (drop-upcycling, arXiv 2502.19261). `granularity` G cuts each
    copy into G experts of a G-th of its width, which a token chooses together at first: they have the same router row,
    and their outputs are multiplied by G (virtual groups and weight scaling, arXiv 2410.07524). `num_experts`
    and `top_k` count these narrow experts. `sparse_layers` is `model.sparse_layers`: the others stay dense.
    """

    checkpoint: str = ""
    run_dir: str = ""
    num_experts: int = 8
    top_k: int = 2
    granularity: int = 1
    noise: float = 0.0
    reinit_ratio: float = 0.0
    sparse_layers: Any = "all"
    seed: int = 0
    tokenizer: str | None = None
    ignore_keys: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(bool(self.checkpoint.strip()), "checkpoint='' must name a dense model's run directory or folder")
        require(bool(self.run_dir.strip()), "run_dir='' must name a new folder")
        filled("", self, "tokenizer")
        positive("", self, "num_experts", "top_k", "granularity")
        not_negative("", self, "noise")
        require(0 <= self.reinit_ratio <= 1, f"reinit_ratio={self.reinit_ratio} must be in [0, 1]")
        is_seed("", self, "seed")
        require(self.top_k <= self.num_experts, f"top_k={self.top_k} must be ≤ num_experts={self.num_experts}")
        require(self.top_k > 1, "top_k=1 must be ≥ 2: with one expert a token its weight is always 1, and the router "
                "can't learn from the loss")  # fmt: skip
        for name in ("num_experts", "top_k"):
            value = getattr(self, name)
            require(
                value % self.granularity == 0,
                f"{name}={value} must be divisible by granularity={self.granularity}: a copy's parts stay together",
            )
