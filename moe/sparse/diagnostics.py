"""What the routers did: metrics of balance, confidence and size, layer by layer. None of them influences the training.

A diagnostic of DIAGNOSTICS is two functions and its name. `measure` makes a few numbers from a router's output on one
micro-batch; they are summed (or their largest is taken) over all micro-batches and ranks of a step, so the result is
exact over the global batch. `finish` makes a layer's metric from them. metrics.jsonl, W&B and the report use the name
as it is: NAME is one number of all layers, NAME_layers has each layer's.

Those below it need a pass over held-out text, so evaluations compute them (`moe.train.held_out`).

Shapes: T tokens, E experts, N choices. Sums are float64. Entropies are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.sparse.balance import max_violation
from moe.sparse.routers.base import Choices, Router, RouterOutput


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """`measure(routed)` is a tensor of any shape. `finish(reduced, tokens)` takes it reduced over the step, float64 on
    the CPU, with the step's number of tokens, and returns a layer's one number. `largest` reduces by the maximum, else
    by the sum. `over_layers` makes one number of the layers'; None: `finish` of the sum over the layers."""

    measure: Callable[[RouterOutput], Tensor]
    finish: Callable[[Tensor, float], Tensor]
    largest: bool = False
    over_layers: Callable[[Tensor], Tensor] | None = torch.mean


def demand(routed: RouterOutput) -> Tensor:
    """[E] choices per expert, before any dropping."""
    return routed.counts_E


def kept(routed: RouterOutput) -> Tensor:
    """[2] choices, and how many of them an expert's capacity turned away."""
    return torch.stack((routed.counts_E.sum(), routed.dropped))


def top_probability(routed: RouterOutput) -> Tensor:
    """Σ over tokens of the largest probability."""
    return routed.probs_TE.amax(1).sum()


def probability_mass(routed: RouterOutput) -> Tensor:
    """[E] Σ over tokens of the probabilities."""
    return routed.probs_TE.sum(0)


def absolute_logits(routed: RouterOutput) -> Tensor:
    """Σ over tokens of the mean |logit|."""
    return routed.logits_TE.abs().sum() / routed.logits_TE.shape[1]


def largest_logit(routed: RouterOutput) -> Tensor:
    """max |logit|; 0 of no tokens."""
    if not routed.logits_TE.numel():
        return routed.logits_TE.new_zeros(())
    return torch.stack(torch.aminmax(routed.logits_TE)).abs().amax()


def first_weight(routed: RouterOutput) -> Tensor:
    """[2] Σ over tokens of the first choice's weight, Σ of all choices' weights."""
    choices = routed.choices
    weights_N = choices.weights_N
    if choices.per_token is not None:
        first = weights_N.view(choices.num_tokens, choices.per_token)[:, 0]
    else:
        first = weights_N * choices.tokens_N.diff(prepend=choices.tokens_N.new_full((1,), -1)).ne(0)
    return torch.stack((first.sum(), weights_N.sum()))


def load_variation(counts_E: Tensor, tokens: float = 0) -> Tensor:
    """Coefficient of variation of the load: standard deviation of the counts over their mean (Shazeer et al.,
    arXiv 1701.06538, §4: CV(Load)). 0 when even, √(E − 1) when one expert has all."""
    counts = counts_E.double()
    return counts.std(correction=0) / counts.mean().clamp(min=1e-300)


def load_concentration(counts_E: Tensor, tokens: float) -> Tensor:
    """MaxVio over its largest possible value, E/k − 1 with k = choices per token: 0 when even, 1 when an expert serves
    every token. 0 where k = E, as no other load exists."""
    counts = counts_E.double()
    possible = tokens * len(counts) / counts.sum().clamp(min=1) - 1
    return torch.where(possible > 1e-9, max_violation(counts).double() / possible.clamp(min=1e-9), 0.0)


def entropy_of_mean(probability_E: Tensor, tokens: float = 0) -> Tensor:
    """Entropy of the mean probability over ln E: 1 when all experts are as probable, 0 when one has all. Router entropy
    is the mean of each token's entropy: it is low for a sure router, this one for a collapsed router only."""
    shares_E = probability_E / probability_E.sum()
    return torch.special.entr(shares_E).sum() / math.log(max(2, len(shares_E)))


def _ratio(part_and_whole: Tensor, tokens: float = 0) -> Tensor:
    part, whole = part_and_whole
    return part / whole


def _per_token(total: Tensor, tokens: float) -> Tensor:
    return total / tokens


def _itself(largest: Tensor, tokens: float) -> Tensor:
    return largest


DIAGNOSTICS: dict[str, Diagnostic] = {
    "max_violation": Diagnostic(demand, lambda counts_E, _: max_violation(counts_E)),
    "load_variation": Diagnostic(demand, load_variation),
    "load_concentration": Diagnostic(demand, load_concentration),
    "dead_experts": Diagnostic(demand, lambda counts_E, _: (counts_E == 0).sum(), over_layers=torch.sum),
    "dropped_fraction": Diagnostic(kept, lambda kept, _: kept[1] / kept[0], over_layers=None),
    "router_entropy_of_mean": Diagnostic(probability_mass, entropy_of_mean),
    "router_confidence": Diagnostic(top_probability, _per_token),
    "first_choice_weight": Diagnostic(first_weight, _ratio),
    "router_logit_size": Diagnostic(absolute_logits, _per_token),
    "router_logit_max": Diagnostic(largest_logit, _itself, largest=True, over_layers=torch.amax),
}


def expert_bias(router: Router) -> Tensor | None:
    """[E] what the router adds to its scores for balance: its buffer with "bias" in its name; None without one."""
    experts = router.config.num_experts
    return next((b for name, b in router.named_buffers() if "bias" in name and b.shape == (experts,)), None)


def chosen(choices: Choices, num_experts: int) -> Tensor:
    """bool [T, E]: which experts serve a token."""
    chosen_TE = torch.zeros(choices.num_tokens, num_experts, dtype=torch.bool, device=choices.experts_N.device)
    chosen_TE[choices.tokens_N, choices.experts_N] = True
    return chosen_TE


def served_by_both(chosen_TE: Tensor, other_TF: Tensor) -> Tensor:
    """float64 [E, F]: tokens that expert e of the one layer serves and expert f of the other (or the same)."""
    return (chosen_TE.float().T @ other_TF.float()).double()


def coactivation(pairs_EE: Tensor, tokens: float) -> Tensor:
    """[E, E] how much more often than by chance two experts serve the same token: P(i, j) / (P(i) P(j)), of
    `served_by_both` summed over a layer's tokens. 1: independent; 0: never together. NaN on the diagonal, and for an
    expert that serves no token."""
    serves_E = pairs_EE.diagonal()
    lift_EE = pairs_EE * tokens / torch.outer(serves_E, serves_E)
    return lift_EE.masked_fill(torch.eye(len(lift_EE), dtype=torch.bool), math.nan)


def overlap(pairs_EF: Tensor, choices: float) -> Tensor:
    """Share of a layer's `choices` whose token has the same expert number in the next layer. Chance is k/E: numbers
    mean nothing across layers, so more than chance says that the residual stream steers both routers alike."""
    return pairs_EF.diagonal().sum() / max(1.0, choices)


def dependence(pairs_EF: Tensor) -> Tensor:
    """Mutual information in nats between a choice of one layer and a choice of the next for the same token, whatever
    the experts' numbers; 0: the next layer's choices can't be told from this one's."""
    joint_EF = pairs_EF / pairs_EF.sum().clamp(min=1)
    independent_EF = torch.outer(joint_EF.sum(1), joint_EF.sum(0))
    return torch.xlogy(joint_EF, joint_EF / independent_EF.clamp(min=1e-300)).sum()


def churn(before_TE: Tensor, after_TE: Tensor) -> Tensor:
    """Share of choices that are others than before, for the same tokens: 1 − |before ∩ after| / |before|."""
    return 1 - (before_TE & after_TE).sum() / before_TE.sum().clamp(min=1)
