"""The optimizer: AdamW, or Muon for the matrices inside the blocks and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from moe.config.choices import OptimizerKind, Schedule
from moe.config.rules import default_of, not_negative, positive, require, share

# Linear layers that Muon updates, by the last part of their name. The router, the embedding, the head and adapters
# aren't among them.
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ITERATIONS = 5  # Newton–Schulz steps
MOST_ELEMENTS = 1 << 24  # orthogonalised at the same time; a larger matrix is orthogonalised alone


def matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(rows, columns) of each matrix that Muon orthogonalises in the parameter `name`; None: AdamW updates it.

    A parameter is a number of such matrices one after the other: a linear layer's weight is one, `experts.down_proj`
    [E, H, F] one for each expert, and `experts.gate_up_proj` [E, 2F, H] two, gate and up, which are stored together.
    """
    module, _, last = name.rpartition(".")
    if len(shape) == 3 and module.rpartition(".")[2] == "experts":
        if last == "gate_up_proj":
            return shape[1] // 2, shape[2]
        return (shape[1], shape[2]) if last == "down_proj" else None
    if len(shape) == 2 and last == "weight" and module.rpartition(".")[2] in MATRICES:
        return shape[0], shape[1]
    return None


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """`kind=adamw` is AdamW for all parameters. `kind=muon` (write `optim=muon`) is Muon for the matrices of attention,
    MLPs and experts, and AdamW for the rest: docs/optimizers.md. `betas` and `eps` are AdamW's, `momentum` is Muon's.

    `base_hidden_size` is the width that `lr` is for: a model of another `hidden_size` learns at lr × base_hidden_size /
    hidden_size, so that one `lr` serves all widths; null: at `lr` (docs/optimizers.md, "The rate and the width").
    `warmup_steps=null` is a twentieth of train.steps, `decay_steps=null` (with warmup_stable_decay) a fifth.
    The rate decays to `min_lr_ratio` × its peak. The multipliers are factors on it for routers and for experts.
    Parameters whose names fit a pattern of `freeze`, as in `optim.freeze=[*.mlp.gate.*]`, stay as they are; a router
    none of whose weights trains keeps its bias too."""

    kind: OptimizerKind = OptimizerKind.adamw
    lr: float = 1e-3
    base_hidden_size: int | None = None
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    schedule: Schedule = Schedule.cosine
    warmup_steps: int | None = None
    decay_steps: int | None = None
    min_lr_ratio: float = 0.1
    router_lr_multiplier: float = 1.0
    experts_lr_multiplier: float = 1.0
    freeze: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        positive("optim", self, "lr", "base_hidden_size", "eps", "max_grad_norm", "decay_steps")
        positive("optim", self, "router_lr_multiplier", "experts_lr_multiplier")
        not_negative("optim", self, "weight_decay", "warmup_steps")
        share("optim", self, "momentum")
        require(
            self.kind is OptimizerKind.muon or self.momentum == default_of(self, "momentum"),
            f"optim.momentum={self.momentum} needs optim=muon: AdamW's own are optim.betas",
        )
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas={self.betas} must be two numbers in [0, 1), as in optim.betas=[0.9,0.95]",
        )
        require(0 <= self.min_lr_ratio <= 1, f"optim.min_lr_ratio={self.min_lr_ratio} must be in [0, 1]")
        require(
            self.decay_steps is None or self.schedule is Schedule.warmup_stable_decay,
            f"optim.decay_steps={self.decay_steps} needs optim.schedule=warmup_stable_decay, not {self.schedule.name}",
        )

    def left_to_train(self, parameters: Sequence[str], trained: Sequence[str]) -> list[str]:
        """Those of `trained` that no pattern of `freeze` fits. Raises UserError for a pattern that fits none of the
        model's parameters, and if nothing is left."""
        for pattern in self.freeze:
            require(
                any(fnmatchcase(name, pattern) for name in parameters),
                f"optim.freeze={pattern}: no parameter of this model fits; names are like {', '.join(parameters[:8])}",
            )
        left = [name for name in trained if not any(fnmatchcase(name, pattern) for pattern in self.freeze)]
        require(bool(left), f"optim.freeze={','.join(self.freeze)}: leaves nothing to train: freeze less")
        return left
