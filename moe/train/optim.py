"""Learning rates as functions of the step alone, so that a resume needs no scheduler state."""

from __future__ import annotations

import math

from moe.config import Config, Schedule
from moe.engine.base import EXPERTS, ROUTER


def learning_rate(config: Config, step: int) -> float:
    """The rate of optimizer step `step` (0-based) of `train.steps`.

    Linear warm-up over `warmup_steps` (null: a twentieth of the steps) to `config.peak_rate`, then: `cosine` decays
    along half a cosine to `min_lr_ratio` × the peak at the last step, `linear` along a straight line
    (arXiv 2502.15938); `warmup_stable_decay` stays at the peak and decays linearly to the same rate over the last
    `decay_steps` (null: a fifth; arXiv 2404.06395); `constant` stays.
    """
    optim, steps, peak = config.optim, config.train.steps, config.peak_rate
    warmup_steps = optim.warmup_steps if optim.warmup_steps is not None else steps // 20
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    floor = peak * optim.min_lr_ratio
    if optim.schedule is Schedule.constant:
        return peak
    if optim.schedule in (Schedule.cosine, Schedule.linear):
        span = max(1, steps - 1 - warmup_steps)
        progress = min(1.0, (step - warmup_steps) / span)
        left = 1 - progress if optim.schedule is Schedule.linear else 0.5 * (1 + math.cos(math.pi * progress))
        return floor + (peak - floor) * left
    decay_steps = optim.decay_steps if optim.decay_steps is not None else max(1, steps // 5)
    remaining = steps - 1 - step
    return peak if remaining >= decay_steps else floor + (peak - floor) * remaining / decay_steps


def lr_scales(config: Config, step: int) -> dict[str, float]:
    """Factors on the learning rate in optimizer step `step` (0-based): 0 for a frozen router, whose Adam moments and
    weight decay would move it without a gradient."""
    frozen = config.router.frozen(step, config.train.steps)
    router, experts = config.optim.router_lr_multiplier, config.optim.experts_lr_multiplier
    return {ROUTER: 0.0 if frozen else router, EXPERTS: experts}
