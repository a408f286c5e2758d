"""Balance: the losses that keep experts in use, and the metrics that show whether they are.

Tokens are those that are routed: padding, which only fills up a sequence, is never counted.

Shapes: T tokens, E experts, L sparse layers, B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe.sparse.real_tokens import RealTokens, token_mean

if TYPE_CHECKING:
    from moe.sparse.routers.base import RouterOutput


def load_balancing_loss(probs_TE: Tensor, counts_E: Tensor) -> Tensor:
    """E · Σᵢ fᵢ Pᵢ of one layer (Switch Transformer, arXiv 2101.03961, eq. 4–6), a scalar; 1.0 when usage is uniform.

    fᵢ is the share of all T·k choices that went to expert i (before dropping: a dropped choice is still demand), Pᵢ the
    mean router probability. Only P carries a gradient. A router that sends everything to one expert with certainty
    scores E; 1.0 is the least for a router whose choices follow its probabilities.
    """
    fractions_E = counts_E.to(probs_TE.dtype) / counts_E.sum().clamp(min=1)
    return probs_TE.shape[1] * torch.dot(fractions_E, token_mean(probs_TE))


def sequence_balancing_loss(
    probs_TE: Tensor, ids_TK: Tensor, num_sequences: int, real: RealTokens | None = None
) -> Tensor:
    """Mean over sequences of `load_balancing_loss`, f and P over one sequence's tokens alone (DeepSeek-V3, arXiv
    2412.19437, eq. 17–20), a scalar. Where sequences have `real` tokens only in part, each weighs as many as it has."""
    if real is not None:
        return _unequal_sequences(probs_TE, ids_TK, real)
    probs_BSE = probs_TE.unflatten(0, (num_sequences, -1))
    ids_BN = ids_TK.reshape(num_sequences, -1)
    counts_BE = probs_BSE.new_zeros(num_sequences, probs_TE.shape[1])
    counts_BE.scatter_add_(1, ids_BN, torch.ones_like(ids_BN, dtype=counts_BE.dtype))
    fractions_BE = counts_BE / max(1, ids_BN.shape[1])
    return probs_TE.shape[1] * (fractions_BE * probs_BSE.mean(1)).sum(1).mean()


def _unequal_sequences(probs_TE: Tensor, ids_TK: Tensor, real: RealTokens) -> Tensor:
    tokens, experts = probs_TE.shape
    lengths_B1 = real.lengths_B[:, None]
    counts_BE = real.lengths_B.new_zeros(real.num_sequences * experts)
    places_TK = real.sequences_T[:, None] * experts + ids_TK
    counts_BE = counts_BE.scatter_add_(0, places_TK.flatten(), torch.ones_like(ids_TK.flatten())).view(-1, experts)
    fractions_BE = counts_BE.to(probs_TE.dtype) / (lengths_B1 * ids_TK.shape[1]).clamp(min=1)
    total_BE = real.spread(probs_TE).unflatten(0, (real.num_sequences, -1)).sum(1)  # P times the sequence's tokens
    return experts * (fractions_BE * total_BE).sum() / max(1, tokens)


def usage_variance(probs_TE: Tensor) -> Tensor:
    """Σᵢ (Pᵢ − 1/E)² with Pᵢ the mean router probability, a scalar: 0 when uniform, 1 − 1/E when one expert has all."""
    return (token_mean(probs_TE) - 1 / probs_TE.shape[1]).square().sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """mean over tokens of logsumexp(logits)², a scalar (ST-MoE, arXiv 2202.08906, eq. 5): keeps router logits small."""
    return token_mean(torch.logsumexp(logits_TE, dim=1).square())


def balance_loss(outputs: Sequence[RouterOutput], *, num_layers: int | None = None) -> Tensor:
    """What is added to the language-model loss, a scalar: each of the routers' losses, computed per layer, averaged
    over the layers and multiplied by its coefficient.

    Pooling the layers first would score layers that collapsed onto *different* experts as perfectly balanced.
    Raises ValueError unless there is one output for each of `num_layers`: training a router without its balance
    losses must be a choice (a coefficient of 0), never an accident.
    """
    if not outputs or (num_layers is not None and len(outputs) != num_layers):
        expected = "≥ 1" if num_layers is None else str(num_layers)
        raise ValueError(
            f"router outputs={len(outputs)} must be {expected}, one per sparse layer: without them the balance "
            "losses are lost (to train without them set their coefficients to 0)"
        )
    terms = []
    for name in dict.fromkeys(name for output in outputs for name in output.losses):
        losses = [output.losses[name] for output in outputs if name in output.losses]
        values, coefficients = torch.stack([loss.value for loss in losses]), {loss.coefficient for loss in losses}
        if len(losses) == len(outputs) and len(coefficients) == 1:
            terms.append(coefficients.pop() * values.mean())
        else:  # layers with routers of their own
            weights = values.new_tensor([loss.coefficient for loss in losses])
            terms.append((weights * values).sum() / len(outputs))
    total = outputs[0].probs_TE.new_zeros(()) if not terms else terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def max_violation(counts_LE: Tensor) -> Tensor:
    """maxᵢ cᵢ / mean(c) − 1 over the last dim (arXiv 2408.15664, eq. 4): 0 when uniform, E − 1 when one expert has all.

    Takes counts [..., E] of any integer or float dtype, returns float32 [...]; no choices at all count as uniform.
    """
    counts = counts_LE.float()
    mean = counts.mean(-1)
    return torch.where(mean > 0, counts.amax(-1) / mean.clamp(min=torch.finfo(torch.float32).tiny) - 1, 0.0)


def router_entropy(probs_TE: Tensor) -> Tensor:
    """Mean over tokens of the router's entropy in nats, a scalar: ln E when indifferent, 0 when certain."""
    return token_mean(torch.special.entr(probs_TE).sum(-1))
