"""How the next token is picked from the model's logits. V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.config.generate import Sampling


def pick(logits_V: Tensor, seen: set[int], settings: Sampling, generator: torch.Generator) -> int:
    """The next token of a text that has the tokens `seen`, from float32 logits [V] (not changed)."""
    if settings.repetition_penalty != 1:
        seen_N = torch.tensor(sorted(seen))
        values = logits_V[seen_N]
        penalty = settings.repetition_penalty
        logits_V = logits_V.index_put((seen_N,), torch.where(values > 0, values / penalty, values * penalty))
    if settings.temperature == 0:
        return int(logits_V.argmax())
    values_V, order_V = logits_V.sort(descending=True, stable=True)
    scaled_V = values_V / settings.temperature
    if values_V[0].isfinite() and not scaled_V[0].isfinite():  # so close to 0 that float32 can't tell it from 0
        return int(order_V[0])
    probs_V = torch.softmax(scaled_V, dim=-1)
    if settings.top_k is not None:
        probs_V[settings.top_k :] = 0
    if settings.top_p < 1:  # of the tokens that top_k left, the fewest whose probabilities add up to top_p
        probs_V /= probs_V.sum()
        beyond_V = probs_V.cumsum(0) - probs_V >= settings.top_p
        beyond_V[0] = False  # a top_p that float32 takes for 0 keeps one token too
        probs_V[beyond_V] = 0
    return int(order_V[torch.multinomial(probs_V, 1, generator=generator)])
