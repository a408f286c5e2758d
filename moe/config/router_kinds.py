"""The options of each kind of router."""

from __future__ import annotations

from dataclasses import dataclass

from moe.config.choices import BiasUpdate, DropPolicy, ScoringFunction
from moe.config.router import RouterConfig, register_router
from moe.config.rules import not_negative, positive, require, share


@dataclass(kw_only=True, slots=True)
class TokenChoiceConfig(RouterConfig):
    """Routers in which each token chooses `top_k` experts, by scores that a function makes of the logits.

    Weights are the chosen experts' scores, divided by their sum (`norm_topk_prob`), times `routed_scaling_factor`.
    Coefficients scale losses, not metrics: `aux_loss_coef` the load-balancing loss of each micro-batch,
    `sequence_aux_loss_coef` that of each sequence, `global_aux_loss_coef` that of the step's global batch,
    `variance_loss_coef` the variance of the experts' usage, `z_loss_coef` the square of the logits' logsumexp.
    `bias_update` moves a bias, which acts on the choice alone, by `bias_update_rate` after every accepted step.
    `jitter_noise` multiplies the router's input by uniform noise in [1 − ε, 1 + ε). Noise and capacity
    (`capacity_factor`; None is dropless) act in training only.
    """

    top_k: int = 2
    scoring_func: ScoringFunction = ScoringFunction.softmax
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    aux_loss_coef: float = 0.02
    sequence_aux_loss_coef: float = 0.0
    global_aux_loss_coef: float = 0.0
    variance_loss_coef: float = 0.0
    z_loss_coef: float = 0.001
    bias_update: BiasUpdate = BiasUpdate.none
    bias_update_rate: float = 0.001
    jitter_noise: float = 0.0
    capacity_factor: float | None = None
    drop_policy: DropPolicy = DropPolicy.position

    def __post_init__(self) -> None:
        RouterConfig.__post_init__(self)  # slots=True makes a new class, which a bare super() does not know
        positive("router", self, "top_k", "capacity_factor", "routed_scaling_factor")
        not_negative("router", self, *_COEFFICIENTS, "bias_update_rate")
        share("router", self, "jitter_noise")
        most = self.highest("top_k")
        require(most <= self.num_experts, f"router.top_k={most} must be ≤ router.num_experts={self.num_experts}")
        require(
            not (self.norm_topk_prob and self._lowest_top_k() == 1 and self.num_experts > 1),
            f"router.top_k={self._lowest_top_k()} with router.norm_topk_prob=true gives every token the weight 1, so "
            "the language-model loss trains no router: set router.norm_topk_prob=false (plain scores, as router=switch "
            "has them)",
        )

    def _lowest_top_k(self) -> int:
        return min(self.at("top_k", step) for step in self.schedules.get("top_k", {0: self.top_k}))

    @classmethod
    def scheduled(cls) -> tuple[str, ...]:
        return "top_k", "bias_update_rate", *_COEFFICIENTS

    @property
    def experts_per_token(self) -> int:
        return self.highest("top_k")

    @property
    def keeps_balance(self) -> bool:
        """Whether a loss or a bias keeps the experts in use."""
        losses = (name for name in _COEFFICIENTS if name != "z_loss_coef")
        return self.bias_update is not BiasUpdate.none or any(self.highest(name) > 0 for name in losses)


_COEFFICIENTS = (
    "aux_loss_coef", "sequence_aux_loss_coef", "global_aux_loss_coef", "variance_loss_coef", "z_loss_coef",
)  # fmt: skip


@dataclass(kw_only=True, slots=True)
class TopKRouterConfig(TokenChoiceConfig):
    """The `top_k` experts with the highest scores."""


@dataclass(kw_only=True, slots=True)
class GroupLimitedRouterConfig(TokenChoiceConfig):
    """Experts stand in `n_group` groups of equal size; a token chooses among those of its `topk_group` best groups."""

    kind: str = "group_limited"
    n_group: int = 4
    topk_group: int = 2

    def __post_init__(self) -> None:
        TokenChoiceConfig.__post_init__(self)
        positive("router", self, "n_group", "topk_group")
        experts, groups, best = self.num_experts, self.n_group, self.topk_group
        require(
            experts % groups == 0, f"router.n_group={groups} must divide router.num_experts={experts}: groups are equal"
        )
        require(
            experts // groups >= 2,
            f"router.n_group={groups} must be ≤ router.num_experts / 2 = {experts // 2}: a group's score is the sum of "
            "its two best experts'",
        )
        require(best <= groups, f"router.topk_group={best} must be ≤ router.n_group={groups}")
        most, there = self.highest("top_k"), best * (experts // groups)
        require(most <= there, f"router.top_k={most} must be ≤ the {there} experts of router.topk_group={best} groups")


@dataclass(kw_only=True, slots=True)
class NoisyTopKRouterConfig(TokenChoiceConfig):
    """Normal noise on the logits, with a deviation that the router learns, times `noise_std`; in training only."""

    kind: str = "noisy_topk"
    noise_std: float = 1.0

    def __post_init__(self) -> None:
        TokenChoiceConfig.__post_init__(self)
        not_negative("router", self, "noise_std")

    @classmethod
    def scheduled(cls) -> tuple[str, ...]:
        return *TokenChoiceConfig.scheduled(), "noise_std"

    def parameter_names(self) -> tuple[str, ...]:
        return "weight", "noise_weight"


@dataclass(kw_only=True, slots=True)
class GumbelRouterConfig(TokenChoiceConfig):
    """Gumbel noise on the logits in training, which are divided by `temperature`."""

    kind: str = "gumbel"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        TokenChoiceConfig.__post_init__(self)
        positive("router", self, "temperature")

    @classmethod
    def scheduled(cls) -> tuple[str, ...]:
        return *TokenChoiceConfig.scheduled(), "temperature"


@dataclass(kw_only=True, slots=True)
class ExpertChoiceRouterConfig(RouterConfig):
    """Each expert takes the ceil(S · capacity_factor / E) tokens of a sequence of S that score highest for it.

    It is balanced by construction, but looks at later tokens: see `moe.sparse.routers.expert_choice`.
    """

    kind: str = "expert_choice"
    capacity_factor: float = 2.0
    z_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        RouterConfig.__post_init__(self)
        positive("router", self, "capacity_factor")
        not_negative("router", self, "z_loss_coef")
        require(
            self.capacity_factor <= self.num_experts,
            f"router.capacity_factor={self.capacity_factor} must be ≤ router.num_experts={self.num_experts}: with as "
            "many every expert takes every token",
        )

    @classmethod
    def scheduled(cls) -> tuple[str, ...]:
        return ("z_loss_coef",)

    @property
    def experts_per_token(self) -> int:
        return max(1, round(self.capacity_factor))

    @property
    def is_causal(self) -> bool:
        return False


for _kind, _schema, _module in (
    ("topk", TopKRouterConfig, "topk:TopKRouter"),
    ("group_limited", GroupLimitedRouterConfig, "group_limited:GroupLimitedRouter"),
    ("noisy_topk", NoisyTopKRouterConfig, "noisy_topk:NoisyTopKRouter"),
    ("gumbel", GumbelRouterConfig, "gumbel:GumbelRouter"),
    ("expert_choice", ExpertChoiceRouterConfig, "expert_choice:ExpertChoiceRouter"),
):
    register_router(_kind, _schema, f"moe.sparse.routers.{_module}")
