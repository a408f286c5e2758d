"""What the routers' tests share."""

from __future__ import annotations

import torch

from moe.config.router import RouterConfig
from moe.sparse.randomness import Randomness
from moe.sparse.routers import Router, build_router
from moe.sparse.routers.base import RouterOutput


def made(config: RouterConfig, hidden: int = 16) -> Router:
    """A router with weights of N(0, 1)."""
    router = build_router(hidden, config)
    for number, weight in enumerate(router.parameters()):
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(number))
    return router


def with_logits(config: RouterConfig) -> Router:
    """A router whose logits are its input: hidden dimensions are experts."""
    router = build_router(config.num_experts, config)
    with torch.no_grad():
        for weight in router.parameters():
            weight.copy_(torch.eye(config.num_experts))
    return router


def noise(batch: int, seed: int = 0) -> Randomness:
    return Randomness.of(seed, 0, torch.arange(batch))


def ids_of(routed: RouterOutput) -> torch.Tensor:
    """[T, K] of a dropless token-choice router."""
    assert routed.choices.per_token is not None
    return routed.choices.experts_N.view(-1, routed.choices.per_token)


def weights_of(routed: RouterOutput) -> torch.Tensor:
    return routed.choices.weights_N.view(-1, routed.choices.per_token or 1)


def rows_of(routed: RouterOutput) -> list[tuple[int, int]]:
    """(token, expert) of every choice that was kept."""
    return list(zip(routed.choices.tokens_N.tolist(), routed.choices.experts_N.tolist(), strict=True))


def checked_gradients(router: Router, x_BSH: torch.Tensor, randomness: Randomness | None = None) -> None:
    """float64 gradients of weights and losses, in input and parameters, against finite differences. The choice itself
    must not change within them."""
    router.double()
    x_BSH = x_BSH.double().requires_grad_()
    names = [name for name, _ in router.named_parameters()]

    def outputs(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        routed = torch.func.functional_call(router, dict(zip(names, parameters, strict=True)), (x, randomness))
        return routed.choices.weights_N, *(loss.value for loss in routed.losses.values())

    parameters = [parameter.detach().clone().requires_grad_() for parameter in router.parameters()]
    assert torch.autograd.gradcheck(outputs, (x_BSH, *parameters), eps=1e-7, atol=1e-5)
