"""Token choice: each token goes to the k experts that score highest for it, in steps that a router may replace.

input (jitter) → logits → noise → scores → choice (bias, groups) → weights → capacity → losses

Shapes: B sequences, S positions, P = B·S places, T tokens (all places, less those that only fill up their sequence),
H hidden, E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moe.config import BiasUpdate, ScoringFunction, TokenChoiceConfig
from moe.kernels.policy import widen
from moe.kernels.wide_linear import wide_linear
from moe.sparse.balance import load_balancing_loss, router_entropy, sequence_balancing_loss, usage_variance, z_loss
from moe.sparse.randomness import Randomness
from moe.sparse.real_tokens import RealTokens
from moe.sparse.routers.base import Choices, Router, RouterLoss, RouterOutput, count_choices
from moe.sparse.routers.capacity import expert_capacities, expert_capacity, keep_choices

NOISE = 1  # the place of noise on logits in a layer's randomness; jitter has the layer's own


class TokenChoiceRouter(Router):
    """Mixtral's router (arXiv 2401.04088, eq. 2–3) by default: softmax over the k chosen logits.

    Softmax over all experts renormalised over the chosen is the same number; this form also yields the probabilities
    that the balance losses need. Arithmetic is float32 even under bf16 weights or autocast: a rounding error in a logit
    is another expert, not a small difference.
    """

    config: TokenChoiceConfig
    e_score_correction_bias: Tensor  # float32 [E], only with router.bias_update

    def __init__(self, hidden_size: int, config: TokenChoiceConfig) -> None:
        super().__init__(hidden_size, config)
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        if config.bias_update is not BiasUpdate.none:
            self.register_buffer("e_score_correction_bias", torch.empty(config.num_experts))
            self.reset_buffers()

    @property
    def keeps_balance(self) -> bool:
        return self.config.keeps_balance

    @property
    def counts_global_batch(self) -> bool:
        return self.config.highest("global_aux_loss_coef") > 0

    def forward(
        self, x_BSH: Tensor, randomness: Randomness | None = None, real: RealTokens | None = None
    ) -> RouterOutput:
        """Route x [B, S, H] of any float dtype. Differentiable through logits, probabilities, weights and losses.

        NOTE: noise and `router.capacity_factor` act in training mode only. In evaluation a token would otherwise lose
        experts to its neighbours, and cached decoding (S = 1) would differ from recomputation. Noise needs
        `randomness`: ValueError without.
        """
        with torch.autocast(x_BSH.device.type, enabled=False):
            input_PH = self.jittered(x_BSH, randomness).flatten(0, 1)
            logits_TE = wide_linear(input_PH, self.trained(self.adapted(self.weight)))
            scored_TE = self.noisy(logits_TE, input_PH, x_BSH.shape[:2], randomness)
            if real is not None:
                logits_TE, scored_TE = real.select(logits_TE), real.select(scored_TE)
            scores_TE, probs_TE = self.scores(scored_TE)
            ids_TK, weights_TK = self.chosen(scores_TE)
            counts_E = count_choices(ids_TK.flatten(), self.config.num_experts)
            return RouterOutput(
                choices=Choices.top_k(ids_TK, weights_TK, self.kept(ids_TK, scores_TE.detach(), x_BSH.shape, real)),
                logits_TE=logits_TE,
                probs_TE=probs_TE,
                counts_E=counts_E,
                losses=dict(self.losses(logits_TE, probs_TE, ids_TK, counts_E, x_BSH.shape[0], real)),
                diagnostics={"router_entropy": router_entropy(probs_TE.detach())},
            )

    def route(self, x_TH: Tensor) -> Choices:
        """Without probabilities, counts, losses and metrics."""
        logits_TE = wide_linear(x_TH, self.adapted(self.weight))
        scores_TE, _ = self.scores(self.noisy(logits_TE, x_TH, torch.Size((x_TH.shape[0], 1)), None))
        return Choices.top_k(*self.chosen(scores_TE))

    def chosen(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Experts [T, K], the best first, and their weights."""
        ids_TK = self.choose(self.biased(scores_TE), self.at("top_k"))
        return ids_TK, self.weights(scores_TE.gather(1, ids_TK))

    def jittered(self, x_BSH: Tensor, randomness: Randomness | None) -> Tensor:
        """The router's input, in training, widened, times noise (Switch Transformer, arXiv 2101.03961, §2.2)."""
        if not (self.config.jitter_noise and self.training):
            return x_BSH
        return self.needed(randomness, "jitter_noise").jitter(widen(x_BSH), self.config.jitter_noise)

    def noisy(
        self, logits_TE: Tensor, input_TH: Tensor, sequences: torch.Size, randomness: Randomness | None
    ) -> Tensor:
        """Logits [T, E] that scores are made of, of `sequences` [B, S]."""
        del input_TH, sequences, randomness
        return logits_TE

    def scores(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Scores, and the probabilities that balance losses see: scores over their sum (DeepSeek-V3, arXiv 2412.19437,
        eq. 18)."""
        if self.config.scoring_func is ScoringFunction.softmax:
            probs_TE = torch.softmax(logits_TE, dim=-1)
            return probs_TE, probs_TE
        scores_TE = logits_TE.sigmoid()
        return scores_TE, scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=TINY)

    def biased(self, scores_TE: Tensor) -> Tensor:
        """Scores that decide the choice: with the loss-free bias, which weights don't see (arXiv 2408.15664, eq. 3)."""
        if self.config.bias_update is BiasUpdate.none:
            return scores_TE
        return scores_TE.detach() + self.e_score_correction_bias

    def choose(self, scores_TE: Tensor, top_k: int) -> Tensor:
        """Experts [T, K], the highest score first."""
        return torch.topk(scores_TE, top_k, dim=-1).indices

    def weights(self, chosen_TK: Tensor) -> Tensor:
        """The chosen experts' weights, of their scores."""
        if self.config.norm_topk_prob:
            chosen_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True).clamp(min=TINY)
        factor = self.config.routed_scaling_factor
        return chosen_TK if factor == 1 else chosen_TK * factor

    def kept(
        self, ids_TK: Tensor, scores_TE: Tensor, shape: torch.Size, real: RealTokens | None = None
    ) -> Tensor | None:
        """Which choices the experts' capacity leaves, bool [T, K]; None when it leaves all."""
        config = self.config
        if config.capacity_factor is None or not self.training:
            return None
        rule = ids_TK.shape[1], config.num_experts, config.capacity_factor
        capacity = expert_capacity(shape[1], *rule) if real is None else expert_capacities(real, *rule)
        return keep_choices(ids_TK, scores_TE, shape[0], capacity, config.drop_policy, real)

    def losses(
        self,
        logits_TE: Tensor,
        probs_TE: Tensor,
        ids_TK: Tensor,
        counts_E: Tensor,
        num_sequences: int,
        real: RealTokens | None = None,
    ) -> Iterator[tuple[str, RouterLoss]]:
        """The first and the last are metrics also with a coefficient of 0; the others are computed where they count."""
        yield "load_balancing_loss", RouterLoss(load_balancing_loss(probs_TE, counts_E), self.at("aux_loss_coef"))
        if self.config.highest("sequence_aux_loss_coef"):
            value = sequence_balancing_loss(probs_TE, ids_TK, num_sequences, real)
            yield "sequence_balancing_loss", RouterLoss(value, self.at("sequence_aux_loss_coef"))
        if self.counts_global_batch:
            counted = self.global_counts_E if self.training else None
            value = load_balancing_loss(probs_TE, counts_E if counted is None else counted)
            yield "global_balancing_loss", RouterLoss(value, self.at("global_aux_loss_coef"))
        if self.config.highest("variance_loss_coef"):
            yield "usage_variance", RouterLoss(usage_variance(probs_TE), self.at("variance_loss_coef"))
        yield "router_z_loss", RouterLoss(z_loss(logits_TE), self.at("z_loss_coef"))

    def reset_buffers(self) -> None:
        if self.config.bias_update is not BiasUpdate.none:
            self.e_score_correction_bias.zero_()

    @torch.no_grad()
    def after_step(self, counts_E: Tensor) -> None:
        """b += rate · sign(mean(c) − c), or in proportion: rate · (mean(c) − c) / mean(c) (arXiv 2408.15664, §3)."""
        if self.config.bias_update is BiasUpdate.none or self.frozen:
            return
        counts = counts_E.double()
        error = counts.mean() - counts
        if self.config.bias_update is BiasUpdate.sign:
            error = error.sign()
        else:
            error = error / counts.mean().clamp(min=1)
        self.e_score_correction_bias += (self.at("bias_update_rate") * error).float()


TINY = 1e-20  # keeps scores that all underflowed from dividing 0 by 0
