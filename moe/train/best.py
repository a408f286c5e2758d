"""The best checkpoint by a metric of the evaluations, and the end of training once it no longer improves."""

from __future__ import annotations

import math
from typing import Any

from moe.checkpoint.state import TrainState
from moe.config import CheckpointConfig
from moe.errors import UserError
from moe.untrusted import is_count, is_real


class Best:
    """Remembers, in the training state, the best value so far, its step, and how many evaluations came after it."""

    def __init__(self, config: CheckpointConfig, state: TrainState) -> None:
        """Raises UserError where the state has no such values."""
        self._metric, self._state = config.metric_for_best_model, state
        self._sign = 1.0 if config.greater_is_better else -1.0
        self._patience = config.early_stopping_patience
        known = state.best
        if known and not (
            is_real(known.get("value")) and is_count(known.get("step"), state.step) and is_count(known.get("since"))
        ):
            raise UserError(f"state.json: best={known} must have value, step and since: use another checkpoint")
        if known and known.get("metric") != self._metric:
            state.best = {}  # another metric begins anew

    def judge(self, metrics: dict[str, Any]) -> bool:
        """Whether this evaluation is the best so far. The same on all ranks. Raises UserError for a metric that the
        evaluation doesn't have."""
        if self._metric is None:
            return False
        value = metrics.get(self._metric)
        if not isinstance(value, (int, float)):
            there = sorted(name for name, one in metrics.items() if isinstance(one, float))
            raise UserError(
                f"checkpoint.metric_for_best_model={self._metric}: an evaluation has no such number; it has "
                f"{', '.join(there)}"
            )
        best = self._state.best
        if math.isfinite(value) and (not best or self._sign * value > self._sign * best["value"]):
            self._state.best = {"metric": self._metric, "value": value, "step": self._state.step, "since": 0}
            return True
        if best:
            best["since"] += 1
        return False

    @property
    def stops(self) -> bool:
        """Whether `checkpoint.early_stopping_patience` evaluations in a row have not been better."""
        since = self._state.best.get("since", 0)
        return self._patience is not None and since >= self._patience

    def line(self) -> str:
        best = self._state.best
        return f"best {best['metric']} {best['value']:.4f} at step {best['step']}"
