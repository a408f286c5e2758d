"""Refused steps: the norm from which a step is refused, what the user is told, and the end of a run that only refuses.

The engine refuses, on all ranks together. The limit is the mean plus `guard.spike_sigmas` standard deviations of the
norms (before clipping) of the last `guard.spike_window` accepted steps, once there are half as many: the rule of
OLMo-core's SkipStepOptimizer, but refused steps don't enter the window, so that spikes can't make room for more.
All that a resume needs is in TrainState.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from moe.checkpoint.state import TrainState
from moe.config.train import GuardConfig
from moe.distributed.mesh import Mesh
from moe.engine.base import SkipReason, StepResult
from moe.errors import UserError

NAMED = 8  # at most so many micro-batches of a step, and so many steps, are named in one message


class Guard:
    """Per step, on every rank: `norm_limit`; after the update `judge`."""

    def __init__(self, config: GuardConfig, state: TrainState, mesh: Mesh, warn: Callable[[str], None]) -> None:
        self._config, self._state, self._mesh, self._warn = config, state, mesh, warn
        self._limit: float | None = None
        self._blamed: list[str] = []  # one text for each of the last refused steps

    def norm_limit(self) -> float | None:
        """The gradient norm above which the step that begins is refused; None while there are too few to judge by."""
        norms = self._state.recent_norms[-self._config.spike_window :]
        self._limit = None
        if self._config.spike_sigmas is not None and len(norms) >= self._config.spike_window // 2:
            mean = math.fsum(norms) / len(norms)
            variance = math.fsum((norm - mean) ** 2 for norm in norms) / (len(norms) - 1)
            self._limit = mean + self._config.spike_sigmas * math.sqrt(variance)
        return self._limit

    def judge(self, result: StepResult, samples: range, losses: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Counts, and warns of a skipped step.

        `samples` are the step's, over all ranks; `losses` this rank's micro-batches' with their sample ids, looked at
        only if the step was skipped; `state.step` is its number.
        """
        state = self._state
        if result.skipped is None:
            state.skipped_in_a_row = 0
            state.recent_norms.append(result.grad_norm)
            del state.recent_norms[: -self._config.spike_window]
            self._blamed.clear()
            return
        state.skipped_in_a_row += 1
        if result.skipped is SkipReason.spike:
            where = f"samples {_span(samples)}"
            reason = (
                f"gradient norm {result.grad_norm:.4g} > {self._limit:.4g}, the mean + {self._config.spike_sigmas:g} σ "
                f"of the last {len(state.recent_norms)} accepted steps, on {where}"
            )
        else:
            mine = [ids_B.tolist() for loss, ids_B in losses if not loss.isfinite()]
            bad = [
                f"samples {_span(ids)} (rank {rank})"
                for rank, batches in enumerate(self._mesh.gather(mine))
                for ids in batches
            ]
            where = _listed(bad) if bad else f"samples {_span(samples)}"
            reason = (
                f"gradient norm {result.grad_norm}, "
                + ("loss not finite" if bad else "every loss finite")
                + f" on {where}"
            )
        self._blamed = [*self._blamed, f"step {state.step} {where}"][-NAMED:]
        self._warn(f"step {state.step}: {reason}; the update is skipped on every rank")

    @property
    def exhausted(self) -> bool:
        """After `guard.max_skipped` refused steps in a row: the run is to end."""
        return self._state.skipped_in_a_row >= self._config.max_skipped

    def check(self) -> None:
        """Raises UserError when exhausted; no weight has moved in the refused steps."""
        if not self.exhausted:
            return
        state = self._state
        refused = state.skipped_in_a_row
        raise UserError(
            f"step {state.step}: {refused} steps in a row were refused (guard.max_skipped={self._config.max_skipped}): "
            f"{'; '.join(self._blamed)}. The weights are those of step {state.step - refused}. The same command goes "
            "on from the newest checkpoint and meets the same samples: lower optim.lr (with "
            "checkpoint.allow_changes=true), mend these samples, or raise guard.max_skipped to pass over them"
        )


def _span(ids: Sequence[int]) -> str:
    """Consecutive numbers, as the loader gives them."""
    return f"{ids[0]}–{ids[-1]}" if len(ids) > 1 else str(ids[0])


def _listed(texts: list[str]) -> str:
    more = len(texts) - NAMED
    return ", ".join(texts[:NAMED]) + (f" and {more} more micro-batches" if more > 0 else "")
