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

from moe.config.train import GuardConfig
from moe.dist.checkpoint import TrainState
from moe.dist.engine import StepResult
from moe.dist.refusal import Refusal
from moe.dist.topology import Topology

NAMED = 8  # at most so many micro-batches of a step, and so many steps, are named in one message


class Guard:
    """Per step, on every rank: `norm_limit`; for each micro-batch `saw`; after the update `judge`."""

    def __init__(self, config: GuardConfig, state: TrainState, topology: Topology, warn: Callable[[str], None]) -> None:
        self._config, self._state, self._topology, self._warn = config, state, topology, warn
        self._losses: list[tuple[Tensor, Tensor]] = []  # of this step's micro-batches, with their sample ids
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

    def saw(self, loss: Tensor, sample_ids_B: Tensor) -> None:
        """A micro-batch's loss, which is looked at only if the step is refused."""
        self._losses.append((loss.detach(), sample_ids_B))

    def judge(self, result: StepResult, samples: range) -> None:
        """Counts, and warns of a refused step. `samples` are the step's, over all ranks; `state.step` is its number."""
        losses, self._losses = self._losses, []
        state = self._state
        if result.refused is None:
            state.refused_in_a_row = 0
            state.recent_norms.append(result.grad_norm)
            del state.recent_norms[: -self._config.spike_window]
            self._blamed.clear()
            return
        state.refused_in_a_row += 1
        if result.refused is Refusal.spike:
            where = f"samples {_span(samples)}"
            reason = (
                f"gradient norm {result.grad_norm:.4g} > {self._limit:.4g}, the mean + {self._config.spike_sigmas:g} σ "
                f"of the last {len(state.recent_norms)} accepted steps, on {where}"
            )
        else:
            mine = [ids_B.tolist() for loss, ids_B in losses if not loss.isfinite()]
            bad = [
                f"samples {_span(ids)} (rank {rank})"
                for rank, batches in enumerate(self._topology.gather(mine))
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
        return self._state.refused_in_a_row >= self._config.max_skipped

    def check(self) -> None:
        """Raises ValueError when exhausted; no weight has moved in the refused steps."""
        if not self.exhausted:
            return
        state = self._state
        refused = state.refused_in_a_row
        raise ValueError(
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
