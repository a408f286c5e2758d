"""Gumbel top-k: experts are sampled without replacement in proportion to their probabilities.

Shapes: T tokens, H hidden, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.config import GumbelRouterConfig
from moe.sparse.randomness import Randomness
from moe.sparse.routers.token_choice import NOISE, TokenChoiceRouter


class GumbelRouter(TokenChoiceRouter):
    """Scores of (logits + g) / τ with Gumbel noise g (Gumbel-softmax, arXiv 1611.01144, eq. 2): the k largest are a
    sample of the experts, and the weights harden as the temperature τ falls. Without noise in evaluation."""

    config: GumbelRouterConfig

    def noisy(
        self, logits_TE: Tensor, input_TH: Tensor, sequences: torch.Size, randomness: Randomness | None
    ) -> Tensor:
        del input_TH
        if self.training:
            source = self.needed(randomness, "temperature").fork(NOISE)
            noise_TE = source.gumbel(sequences[1], logits_TE.shape[1]).flatten(0, 1)
            logits_TE = logits_TE + noise_TE.to(logits_TE.dtype)
        return logits_TE / self.at("temperature")
