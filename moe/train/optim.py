"""Learning rates as functions of the step alone, so that a resume needs no scheduler state."""

from __future__ import annotations

import math

from moe.config import Config, OptimConfig, Schedule
from moe.engine.base import EXPERTS, ROUTER


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (0-based) of `steps`.

    Linear warm-up over `warmup_steps` (null: steps / 20), then: `cosine` decays along half a cosine to
    `lr × min_lr_ratio` at the last step, `linear` along a straight line (arXiv 2502.15938); `warmup_stable_decay` stays
    at `lr` and decays linearly to `lr × min_lr_ratio` over the last `decay_steps` (null: steps / 5; arXiv 2404.06395);
    `constant` stays at `lr`.
    """
    warmup_steps = config.warmup_steps if config.warmup_steps is not None else steps // 20
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    floor = config.lr * config.min_lr_ratio
    if config.schedule is Schedule.constant:
        return config.lr
    if config.schedule in (Schedule.cosine, Schedule.linear):
        span = max(1, steps - 1 - warmup_steps)
        progress = min(1.0, (step - warmup_steps) / span)
        left = 1 - progress if config.schedule is Schedule.linear else 0.5 * (1 + math.cos(math.pi * progress))
        return floor + (config.lr - floor) * left
    decay_steps = config.decay_steps if config.decay_steps is not None else max(1, steps // 5)
    remaining = steps - 1 - step
    return config.lr if remaining >= decay_steps else floor + (config.lr - floor) * remaining / decay_steps


def lr_scales(config: Config, step: int) -> dict[str, float]:
    """Factors on the learning rate in optimizer step `step` (0-based): 0 for a frozen router, whose Adam moments and
    weight decay would move it without a gradient."""
    frozen = config.router.frozen(step, config.train.steps)
    router, experts = config.optim.router_lr_multiplier, config.optim.experts_lr_multiplier
    return {ROUTER: 0.0 if frozen else router, EXPERTS: experts}
