"""The interface of a router, and what it returns for a micro-batch.

Shapes: B sequences, S positions, T tokens (row-major: B·S, less those that only fill up their sequence), H hidden,
E experts, K choices per token, N choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moe.config import RouterConfig
from moe.sparse.randomness import Randomness
from moe.sparse.real_tokens import RealTokens


@dataclass(slots=True)
class Choices:
    """Which token goes to which expert with which weight: one row per choice, in token order.

    A token may have any number of rows, also none. `per_token` is K when every token has exactly K: shapes are
    then known without counting rows, which on a GPU would wait for the device.
    """

    tokens_N: Tensor  # int64, not decreasing
    experts_N: Tensor  # int64, a token's best first
    weights_N: Tensor  # float32 (float64 in a float64 model)
    num_tokens: int
    per_token: int | None = None

    @classmethod
    def top_k(cls, experts_TK: Tensor, weights_TK: Tensor, keep_TK: Tensor | None = None) -> Choices:
        """K choices per token, less those that `keep_TK` (bool) marks False."""
        tokens, per_token = experts_TK.shape
        tokens_N = torch.arange(tokens * per_token, device=experts_TK.device) // per_token
        experts_N, weights_N = experts_TK.flatten(), weights_TK.flatten()
        if keep_TK is None:
            return cls(tokens_N, experts_N, weights_N, tokens, per_token)
        kept_N = keep_TK.flatten().nonzero().squeeze(1)
        return cls(tokens_N[kept_N], experts_N[kept_N], weights_N[kept_N], tokens)

    def chunks(self, number: int) -> list[Choices]:
        """The choices of `number` runs of tokens, equally long or one token longer. Tokens count from each one's
        first."""
        if number == 1:
            return [self]
        tokens = [self.num_tokens * index // number for index in range(number + 1)]
        if self.per_token is not None:
            places = [token * self.per_token for token in tokens]
        else:
            places = torch.searchsorted(self.tokens_N, self.tokens_N.new_tensor(tokens)).tolist()
        made = []
        for index in range(number):
            first, rows = tokens[index], slice(places[index], places[index + 1])
            one = (self.tokens_N[rows] - first, self.experts_N[rows], self.weights_N[rows])
            made.append(Choices(*one, tokens[index + 1] - first, self.per_token))
        return made


class RouterLoss(NamedTuple):
    """A scalar loss of one layer and micro-batch, unscaled as in the metrics, and its coefficient in training."""

    value: Tensor
    coefficient: float


@dataclass(slots=True)
class RouterOutput:
    """What a layer's router did with one micro-batch; returned by every sparse layer, never parked in a global.

    Names in `losses` and `diagnostics` (scalars) become metrics, means over layers and micro-batches, as they are.
    Floats are float32 whatever the model's dtype (float64 in a float64 model). All of it is about this rank's tokens.
    """

    choices: Choices
    logits_TE: Tensor
    probs_TE: Tensor  # router probabilities; each row sums to 1
    counts_E: Tensor  # int64, choices per expert before any dropping: the demand
    losses: dict[str, RouterLoss]
    diagnostics: dict[str, Tensor]

    @property
    def dropped(self) -> Tensor:
        """int64 scalar, choices that an expert's capacity turned away."""
        return self.counts_E.sum() - self.choices.experts_N.numel()


class LowRankWeight(Protocol):
    """What an adapter adds to a router's weight (`moe.adapters.low_rank.LowRank`)."""

    def product(self) -> Tensor:
        """[E, H]."""
        ...


class Router(nn.Module):
    """`forward(x_BSH, randomness, real) -> RouterOutput`. A subclass is registered in `moe.config.router`.

    Buffers are part of the model: they are saved, resharded and verified like weights, and keep their dtype when the
    model is cast. `reset_buffers` sets their initial values.
    """

    def __init__(self, hidden_size: int, config: RouterConfig) -> None:
        super().__init__()
        self.config: Any = config
        self.step, self.total_steps = 0, 1  # of the optimizer, 0-based; set before each step
        self.global_counts_E: Tensor | None = None  # the step's choices, where `counts_global_batch`
        self.lora: LowRankWeight | None = None  # an adapter's addition to `weight`
        self.reads_prefix = False  # in evaluation, whether a router that isn't causal is kept from seeing later tokens

    def forward(
        self, x_BSH: Tensor, randomness: Randomness | None = None, real: RealTokens | None = None
    ) -> RouterOutput:
        """Route x [B, S, H] of any float dtype; `randomness` is the layer's in training, None elsewhere. A sequence's
        choices depend on it alone, and the router stays as it is: a step may call this for parts of a micro-batch, and
        several times.

        `real` are the tokens to route where not all of them are, and the output is about them alone; it is given only
        then.
        """
        raise NotImplementedError

    def route(self, x_TH: Tensor) -> Choices:
        """The choices of `forward` for tokens that are a sequence each, in evaluation, for decoding: without gradients
        and autocast."""
        return self(x_TH[:, None]).choices

    def begin_step(self, step: int, total_steps: int) -> None:
        """Optimizer step number `step` (0-based) of `total_steps` begins, for schedules. The same on all ranks, and
        unchanged until the next one: where activations are recomputed, in evaluation, and in a checkpoint's model."""
        self.step, self.total_steps = step, total_steps

    def after_step(self, counts_E: Tensor) -> None:
        """An update was accepted; `counts_E` (int64) are its choices before dropping, over all ranks and micro-batches.

        Called on all ranks alike, so that buffers stay equal.
        """

    def reset_buffers(self) -> None:
        """Set the buffers' initial values."""

    @property
    def keeps_balance(self) -> bool:
        """Whether anything keeps the experts in use; if not, the run warns at its start."""
        raise NotImplementedError

    @property
    def counts_global_batch(self) -> bool:
        """Whether `global_counts_E` must hold, in training, the choices of the step's whole global batch: int64 [E]
        before dropping, over all ranks and micro-batches. It costs a forward pass without gradients."""
        return False

    @property
    def frozen(self) -> bool:
        """Whether weights and buffers stay as they are in this step: by its schedule, or since none of its weights
        trains."""
        trains = [parameter.requires_grad for parameter in self.parameters()]
        return (bool(trains) and not any(trains)) or self.config.frozen(self.step, self.total_steps)

    def at(self, option: str) -> Any:
        """The option's value in this step."""
        return self.config.at(option, self.step)

    def adapted(self, weight: Tensor) -> Tensor:
        """`weight` [E, H] with what an adapter adds to it."""
        return weight if self.lora is None else weight + self.lora.product()

    def trained(self, weight: Tensor) -> Tensor:
        """`weight`; while the router is frozen its gradient is zero, and not missing, which ZeRO could not reduce."""
        return weight.detach() + 0 * weight if self.frozen and self.training else weight

    def needed(self, randomness: Randomness | None, option: str) -> Randomness:
        """The layer's randomness. Raises ValueError where there is none for the noise of `option`."""
        if randomness is None:
            raise ValueError(f"router.{option}={getattr(self.config, option)} needs the batch's randomness")
        return randomness

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Casts skip buffers: a float32 bias that moves by thousandths would never change in bfloat16."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return self


def routers_of(model: nn.Module) -> Iterator[Router]:
    """The routers of a model's sparse layers, in order."""
    return (module for module in model.modules() if isinstance(module, Router))


def read_prefixes(model: nn.Module, reads: bool = True) -> None:
    """Sets `reads_prefix` of all routers; it changes nothing in those that are causal."""
    for router in routers_of(model):
        router.reads_prefix = reads


def count_choices(experts_N: Tensor, num_experts: int) -> Tensor:
    """int64 [E]: how often each expert was chosen."""
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=experts_N.device)
    return counts_E.scatter_add_(0, experts_N, torch.ones_like(experts_N))
