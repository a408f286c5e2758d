"""transformers' MixtralForCausalLM with our weights, trained by plain PyTorch: the other side of `moe bench peers`.

Float32, two ways to train in bfloat16 with float32 master weights, and one without:

    autocast  float32 weights, torch.autocast around the forward pass
    master    bfloat16 weights; AdamW updates a float32 copy of them with float32 copies of the gradients
    pure      bfloat16 weights, gradients and moments: an update smaller than a weight's rounding is lost
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from moe.bench.stepper import batch_of
from moe.config import Config, ModelConfig, TopKRouterConfig
from moe.errors import UserError
from moe.model.transformer import ModelOutput, Transformer

IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm")
GPU_IMPLEMENTATIONS = ("deepgemm", "sonicmoe")  # bfloat16 kernels, which it takes from the Hub's package `kernels`
# What a Mixtral has no setting for.
NOT_MIXTRAL = ("sparse_layers", "moe_intermediate_size", "n_shared_experts")
CPU = torch.device("cpu")
SAME_LOSS = 1e-4  # nats, between the two sides' first losses in float32
ROUNDED = 0.02  # nats, between a bfloat16 step's first loss and the float32 one


def require_transformers(benchmark: str) -> None:
    """Raises UserError where it isn't installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError(f"bench {benchmark} needs transformers: pip install 'moe-train[dev]'")


Step = Callable[[Tensor], float]  # token ids [B, S] → the step's loss


class Arithmetic(Enum):
    float32 = "float32"
    autocast = "autocast"
    master = "bfloat16 weights"
    pure = "pure bfloat16"


class Peer:
    """The peer's training step. Raises RuntimeError, ImportError or ValueError where this machine can't compute it."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        config: Config,
        arithmetic: Arithmetic,
        implementation: str,
        device: torch.device,
    ) -> None:
        self.name = implementation if arithmetic is Arithmetic.float32 else f"{implementation}, {arithmetic.value}"
        self._config, self._arithmetic, self._device = config, arithmetic, device
        self.model = peer_model(config, implementation, device)
        self.model.load_state_dict(weights)
        if arithmetic in (Arithmetic.master, Arithmetic.pure):
            self.model.to(torch.bfloat16)
        self._trained = list(self.model.parameters())
        if arithmetic is Arithmetic.master:
            self._trained = [nn.Parameter(one.detach().float()) for one in self._trained]
        self._optimizer = adamw(self._trained, config)

    def __call__(self, ids_BS: Tensor) -> float:
        """One optimizer step; returns its loss."""
        with self._context():
            loss = self.model(input_ids=ids_BS, labels=ids_BS).loss
        loss.backward()
        if self._arithmetic is Arithmetic.master:
            for master, parameter in zip(self._trained, self.model.parameters(), strict=True):
                assert parameter.grad is not None
                master.grad = parameter.grad.float()
                parameter.grad = None
        nn.utils.clip_grad_norm_(self._trained, self._config.optim.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._arithmetic is Arithmetic.master:
            with torch.no_grad():
                for master, parameter in zip(self._trained, self.model.parameters(), strict=True):
                    parameter.copy_(master)
        return loss.item()

    @torch.no_grad()
    def lm_loss(self, ids_BS: Tensor) -> float:
        """Nats per target, without the balance loss."""
        with self._context():
            output = self.model(input_ids=ids_BS, labels=ids_BS)
        return float(output.loss) - self.model.config.router_aux_loss_coef * float(output.aux_loss)

    def _context(self) -> AbstractContextManager[Any]:
        if self._arithmetic is Arithmetic.autocast:
            return torch.autocast(self._device.type, torch.bfloat16)
        return nullcontext()


def adamw(parameters: Iterable[nn.Parameter], config: Config) -> torch.optim.AdamW:
    """torch's, with `config.optim`'s rates; weight decay for matrices alone."""
    parameters, optim = list(parameters), config.optim
    decayed = [one for one in parameters if one.ndim >= 2]
    others = [one for one in parameters if one.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.peak_rate,
        betas=(optim.betas[0], optim.betas[1]),
        eps=optim.eps,
        fused=True,
    )


def peer_model(config: Config, implementation: str = "eager", device: torch.device = CPU) -> Any:
    """transformers' Mixtral in our shape, with SDPA attention and its balance loss; weights as it initialises them, on
    `device`: on a GPU billions of them take no time."""
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    model, router = config.model, config.router
    assert isinstance(router, TopKRouterConfig)
    shapes = MixtralConfig(
        **_shared(model),
        num_local_experts=router.num_experts,
        num_experts_per_tok=router.top_k,
        output_router_logits=True,
        router_aux_loss_coef=router.aux_loss_coef / router.top_k,  # theirs is top_k when uniform, ours 1
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        use_cache=False,
        pad_token_id=None,
    )
    with device:
        peer = MixtralForCausalLM._from_config(
            shapes, attn_implementation="sdpa", experts_implementation=implementation, dtype=torch.float32
        )
    return peer.train()


def _shared(model: ModelConfig) -> dict[str, Any]:
    ours_only = ("mlp", "attention", "recompute", "hidden_dropout", "rope_theta", *NOT_MIXTRAL)
    return {name: getattr(model, name) for name in ModelConfig.__slots__ if name not in ours_only}


@torch.no_grad()
def loss_gap(ours: Transformer, peer: Any, ids_BS: Tensor) -> float:
    """Largest difference between the two sides' losses on one batch, in nats. Raises RuntimeError above `SAME_LOSS`:
    a speed ratio between different computations would mean nothing.

    transformers averages router statistics over layers before multiplying them, ours averages the layers' losses. So
    its formula is applied to our routers' outputs.
    """
    output = ours(ids_BS, labels_BS=batch_of(ids_BS).labels_BS)
    theirs = peer(input_ids=ids_BS, labels=ids_BS)
    nats = float(output.lm_loss_sum) / targets_of(ids_BS)
    aux = float(theirs.aux_loss)
    pooled = float(_pooled_balance(output))
    gaps = abs(nats - (float(theirs.loss) - peer.config.router_aux_loss_coef * aux)), abs(pooled - aux)
    if not max(gaps) <= SAME_LOSS:
        raise RuntimeError(
            f"the two sides compute different things: losses differ by {gaps[0]:.1e}, balance by {gaps[1]:.1e}"
        )
    return max(gaps)


def _pooled_balance(output: ModelOutput) -> Tensor:
    counts_E = torch.stack([each.counts_E for each in output.routers]).sum(0)
    probs_E = torch.cat([each.probs_TE for each in output.routers]).mean(0)
    rows = sum(each.probs_TE.shape[0] for each in output.routers)
    return probs_E.numel() * torch.dot(counts_E / rows, probs_E)


def targets_of(ids_BS: Tensor) -> int:
    return ids_BS.shape[0] * (ids_BS.shape[1] - 1)


def copied_too_large(config: Config, tokens: int, layers: int, device: torch.device = CPU) -> str | None:
    """Why batched_mm is left out, None if it isn't: it copies an expert's weights for every choice of the tokens.
    `layers` are those whose copies exist at once: all in training, for the backward pass."""
    choices = tokens * config.router.experts_per_token
    needed = 4 * choices * 3 * config.model.hidden_size * config.model.intermediate_size * layers
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"it copies {needed / 1e9:.0f} GB of expert weights" if needed > free / 2 else None
