"""A small stateful router, made as a user would make one: this file, a YAML and a registration.

Loss-free balancing (arXiv 2408.15664): the k largest of s + b are chosen and weighed with s; after a step b moves by
`rate` towards the experts that had fewer choices than the mean. `moved` counts the accepted steps.

Shapes: T tokens, E experts, K choices per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.config import RouterConfig
from moe.config.presets import add_config_dir
from moe.config.router import register_router
from moe.config.rules import positive
from moe.sparse.balance import load_balancing_loss, router_entropy
from moe.sparse.randomness import Randomness
from moe.sparse.real_tokens import RealTokens, token_mean
from moe.sparse.routers.base import Choices, Router, RouterLoss, RouterOutput, count_choices


@dataclass(kw_only=True, slots=True)
class BiasRouterConfig(RouterConfig):
    """`rate` is the bias's step."""

    kind: str = "bias"
    top_k: int = 2
    rate: float = 0.01

    def __post_init__(self) -> None:
        RouterConfig.__post_init__(self)
        positive("router", self, "top_k", "rate")

    @property
    def experts_per_token(self) -> int:
        return self.top_k


class BiasRouter(Router):
    config: BiasRouterConfig
    bias: Tensor
    moved: Tensor

    def __init__(self, hidden_size: int, config: BiasRouterConfig) -> None:
        super().__init__(hidden_size, config)
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.register_buffer("bias", torch.empty(config.num_experts))
        self.register_buffer("moved", torch.empty((), dtype=torch.int64))
        nn.init.normal_(self.weight, std=0.02)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        self.bias.zero_()
        self.moved.zero_()

    @property
    def keeps_balance(self) -> bool:
        return True

    def forward(
        self, x_BSH: Tensor, randomness: Randomness | None = None, real: RealTokens | None = None
    ) -> RouterOutput:
        dtype = torch.promote_types(x_BSH.dtype, torch.float32)
        x_TH = x_BSH.flatten(0, 1) if real is None else real.select(x_BSH.flatten(0, 1))
        logits_TE = F.linear(x_TH.to(dtype), self.weight.to(dtype))
        scores_TE = logits_TE.sigmoid()
        ids_TK = (scores_TE.detach() + self.bias).topk(self.config.top_k, dim=1).indices
        chosen_TK = scores_TE.gather(1, ids_TK)
        probs_TE = scores_TE / scores_TE.sum(1, keepdim=True)
        counts_E = count_choices(ids_TK.flatten(), self.config.num_experts)
        return RouterOutput(
            choices=Choices.top_k(ids_TK, chosen_TK / chosen_TK.sum(1, keepdim=True)),
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            counts_E=counts_E,
            losses={"score_penalty": RouterLoss(token_mean(scores_TE.square()).mean(), 0.01)},
            diagnostics={
                "load_balancing_loss": load_balancing_loss(probs_TE.detach(), counts_E),
                "router_entropy": router_entropy(probs_TE.detach()),
                "largest_bias": self.bias.abs().max(),
            },
        )

    @torch.no_grad()
    def after_step(self, counts_E: Tensor) -> None:
        counts = counts_E.float()
        self.bias += self.config.rate * (counts.mean() - counts).sign()
        self.moved += 1


def install() -> None:
    """What a user's program does before it composes a configuration."""
    register_router("bias", BiasRouterConfig, f"{__name__}:BiasRouter")
    add_config_dir(Path(__file__).parent / "configs")


install()
