"""Skipped steps: the gradient norm above which a step is skipped, the warnings, and when a run ends because of them.

The engine skips a step on all ranks together. The limit is the mean plus `guard.spike_sigmas` standard deviations of
the gradient norms (before clipping) of the last `guard.spike_window` accepted steps, once there are half as many. That
is the rule of OLMo-core's SkipStepOptimizer, except that the norms of skipped steps don't enter the window: otherwise
a spike would raise the limit for the next one. All that a resume needs is in TrainState.
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

MAX_LISTED = 8  # one message lists at most so many micro-batches of a step, and so many steps


class Guard:
    """Used in each step on every rank: `norm_limit` before the update, `judge` after it."""

    def __init__(self, config: GuardConfig, state: TrainState, mesh: Mesh, warn: Callable[[str], None]) -> None:
        self._config, self._state, self._mesh, self._warn = config, state, mesh, warn
        self._limit: float | None = None
        self._skipped: list[str] = []  # step and samples of each of the last skipped steps
        self._accepted = 0  # steps of this process

    def norm_limit(self) -> float | None:
        """The gradient norm above which the next step is skipped; None while the window holds too few norms."""
        norms = self._state.recent_norms[-self._config.spike_window :]
        self._limit = None
        if self._config.spike_sigmas is not None and len(norms) >= self._config.spike_window // 2:
            mean = math.fsum(norms) / len(norms)
            variance = math.fsum((norm - mean) ** 2 for norm in norms) / (len(norms) - 1)
            self._limit = mean + self._config.spike_sigmas * math.sqrt(variance)
        return self._limit

    def judge(self, result: StepResult, samples: range, losses: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Updates the counts in TrainState; warns if the step was skipped. A collective.

        `samples`: the step's samples on all ranks. `losses`: for each micro-batch of this rank its loss and its sample
        ids [B], read only if the step was skipped. `state.step` is the step's number, from 1.
        """
        state = self._state
        if result.skipped is None:
            self._accepted += 1
            state.skipped_in_a_row = 0
            state.recent_norms.append(result.grad_norm)
            del state.recent_norms[: -self._config.spike_window]
            self._skipped.clear()
            return
        state.skipped_in_a_row += 1
        if result.skipped is SkipReason.spike:
            where = f"samples {_span(samples)}"
            reason = (
                f"gradient norm {result.grad_norm:.4g} > {self._limit:.4g}, the mean + {self._config.spike_sigmas:g} σ "
                f"of the last {len(state.recent_norms)} accepted steps, on {where}"
            )
        else:
            not_finite = [ids_B.tolist() for loss, ids_B in losses if not loss.isfinite()]
            bad = [
                f"samples {_span(ids)} (rank {rank})"
                for rank, batches in enumerate(self._mesh.gather(not_finite))
                for ids in batches
            ]
            where = _list(bad) if bad else f"samples {_span(samples)}"
            reason = (
                f"gradient norm {result.grad_norm}, "
                + ("loss not finite" if bad else "every loss finite")
                + f" on {where}"
            )
        self._skipped = [*self._skipped, f"step {state.step} {where}"][-MAX_LISTED:]
        self._warn(f"step {state.step}: {reason}; the update is skipped on every rank")

    @property
    def exhausted(self) -> bool:
        """True after `guard.max_skipped` skipped steps in a row: the run must end."""
        return self._state.skipped_in_a_row >= self._config.max_skipped

    def check(self) -> None:
        """At the end of the run. Raises UserError when exhausted, or when no step was accepted since its start: the
        skipped steps changed no weight."""
        state = self._state
        if not self.exhausted:
            if self._skipped and not self._accepted:
                raise UserError(
                    f"step {state.step}: every step since the start was skipped: {'; '.join(self._skipped)}. Nothing "
                    "was learnt: lower optim.lr, or repair these samples, and start with another run_dir"
                )
            return
        skipped = state.skipped_in_a_row
        raise UserError(
            f"step {state.step}: {skipped} steps in a row were skipped (guard.max_skipped={self._config.max_skipped}): "
            f"{'; '.join(self._skipped)}. The weights are those of step {state.step - skipped}. The same command "
            "resumes from the newest checkpoint and meets the same samples: lower optim.lr (with "
            "checkpoint.allow_changes=true), repair these samples, or raise guard.max_skipped to continue past them"
        )


def _span(ids: Sequence[int]) -> str:
    """The range of `ids`, which the loader gives in ascending order without gaps."""
    return f"{ids[0]}–{ids[-1]}" if len(ids) > 1 else str(ids[0])


def _list(texts: list[str]) -> str:
    more = len(texts) - MAX_LISTED
    return ", ".join(texts[:MAX_LISTED]) + (f" and {more} more micro-batches" if more > 0 else "")
