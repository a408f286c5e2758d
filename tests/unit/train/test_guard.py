"""The guard: which gradient norm is a spike, what the warning of a skipped step says, and when a run ends."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from moe.checkpoint.state import TrainState, read_state
from moe.config.train import GuardConfig
from moe.distributed.mesh import Mesh
from moe.engine.base import SkipReason, StepResult
from moe.errors import UserError
from moe.train.guard import MAX_LISTED, Guard
from moe.train.progress import Display
from tests.unit.train.test_tracking import FIGURES

ALONE = Mesh(rank=0, world_size=1, local_rank=0, local_world_size=1, expert_parallel_size=1, device=torch.device("cpu"))
NOT_FINITE = StepResult(math.nan, SkipReason.not_finite)
NORMS = [1.0 + 0.1 * math.sin(step) for step in range(40)]


def _guard(state: TrainState | None = None, warnings: list[str] | None = None, **keys: float) -> Guard:
    config = replace(GuardConfig(spike_window=8, spike_sigmas=3.0), **keys)
    return Guard(config, state or TrainState(), ALONE, (warnings if warnings is not None else []).append)


def _step(guard: Guard, result: StepResult, *losses: tuple[float, list[int]]) -> None:
    """Judges the next step of four samples; `losses`: each micro-batch's loss and its sample ids."""
    guard._state.step += 1
    samples = range(4 * guard._state.step - 4, 4 * guard._state.step)
    guard.judge(result, samples, [(torch.tensor(loss), torch.tensor(ids)) for loss, ids in losses])


def test_the_limit_is_the_mean_plus_n_deviations_of_the_last_accepted_norms() -> None:
    guard = _guard()
    for index, norm in enumerate(NORMS):
        window = NORMS[max(0, index - 8) : index]
        limit = guard.norm_limit()
        if index < 4:
            assert limit is None, "half of the window is needed"
        else:
            assert limit == pytest.approx(statistics.mean(window) + 3 * statistics.stdev(window), rel=1e-12)
        _step(guard, StepResult(norm, None))


def test_without_sigmas_there_is_no_limit_but_the_window_fills() -> None:
    state = TrainState()
    guard = _guard(state, spike_sigmas=None)
    for norm in NORMS:
        _step(guard, StepResult(norm, None))
    assert guard.norm_limit() is None
    assert state.recent_norms == NORMS[-8:]


def test_a_skipped_norm_stays_out_of_the_window() -> None:
    guard = _guard()
    for norm in NORMS[:8]:
        _step(guard, StepResult(norm, None))
    limit = guard.norm_limit()
    for result in (StepResult(50.0, SkipReason.spike), NOT_FINITE):
        _step(guard, result)
        assert guard.norm_limit() == limit


@pytest.mark.parametrize("cut", [3, 10, 14, 15, 16])
def test_a_resume_decides_as_if_there_had_been_no_break(cut: int, tmp_path: Path) -> None:
    results = [StepResult(norm, None) for norm in NORMS]
    results[13:16] = [NOT_FINITE, StepResult(9.0, SkipReason.spike), NOT_FINITE]

    def limits(guard: Guard, part: list[StepResult]) -> list[tuple[float | None, int]]:
        found = []
        for result in part:
            found.append((guard.norm_limit(), guard._state.skipped_in_a_row))
            _step(guard, result)
        return found

    whole = limits(_guard(), results)
    state = TrainState()
    before = limits(_guard(state), results[:cut])
    (tmp_path / "state.json").write_text(json.dumps(asdict(state)))
    assert before + limits(_guard(read_state(tmp_path)), results[cut:]) == whole


def test_a_state_from_before_the_guard_loads(tmp_path: Path) -> None:
    old = {
        key: value
        for key, value in asdict(TrainState(step=7)).items()
        if key not in ("recent_norms", "skipped_in_a_row")
    }
    (tmp_path / "state.json").write_text(json.dumps(old))
    state = read_state(tmp_path)
    assert (state.step, state.recent_norms, state.skipped_in_a_row) == (7, [], 0)


def test_a_warning_names_step_reason_norm_and_samples() -> None:
    warnings: list[str] = []
    guard = _guard(warnings=warnings)
    for norm in NORMS[:4]:
        _step(guard, StepResult(norm, None))
    limit = guard.norm_limit()
    assert limit is not None
    _step(guard, StepResult(50.0, SkipReason.spike))
    _step(guard, NOT_FINITE, (1.0, [20, 21]), (math.inf, [22, 23]))
    _step(guard, NOT_FINITE, (1.0, [24]))
    end = "; the update is skipped on every rank"
    assert warnings == [
        f"step 5: gradient norm 50 > {limit:.4g}, the mean + 3 σ of the last 4 accepted steps, on samples 16–19{end}",
        f"step 6: gradient norm nan, loss not finite on samples 22–23 (rank 0){end}",
        f"step 7: gradient norm nan, every loss finite on samples 24–27{end}",
    ]


def test_losses_of_an_accepted_step_are_forgotten() -> None:
    warnings: list[str] = []
    guard = _guard(warnings=warnings)
    _step(guard, StepResult(1.0, None), (math.nan, [0]))  # can't happen in a run: the engine would skip this step
    _step(guard, NOT_FINITE)
    assert "every loss finite" in warnings[0]


def test_the_run_ends_after_so_many_in_a_row_and_says_what_to_change() -> None:
    guard = _guard(max_skipped=3)
    for result in (NOT_FINITE, NOT_FINITE, StepResult(1.0, None), NOT_FINITE, NOT_FINITE):
        _step(guard, result)
        assert not guard.exhausted
    guard.check()
    _step(guard, NOT_FINITE, (math.nan, [21]))
    assert guard.exhausted
    with pytest.raises(ValueError, match="3 steps in a row") as caught:
        guard.check()
    assert str(caught.value) == (
        "step 6: 3 steps in a row were skipped (guard.max_skipped=3): "
        "step 4 samples 12–15; step 5 samples 16–19; step 6 samples 21 (rank 0). The weights are those of step 3. "
        "The same command resumes from the newest checkpoint and meets the same samples: lower optim.lr (with "
        "checkpoint.allow_changes=true), repair these samples, or raise guard.max_skipped to continue past them"
    )


def test_many_bad_micro_batches_and_steps_stay_one_short_line() -> None:
    warnings: list[str] = []
    guard = _guard(warnings=warnings, max_skipped=1000)
    for _ in range(1000):
        _step(guard, NOT_FINITE, *((math.nan, [sample]) for sample in range(100)))
    assert f"(rank 0) and {100 - MAX_LISTED} more micro-batches" in warnings[0]
    with pytest.raises(ValueError, match="1000 steps") as caught:
        guard.check()
    assert "step 993 samples" in str(caught.value)
    assert "step 992 samples" not in str(caught.value)
    assert len(str(caught.value)) < 3000


def test_the_display_shows_a_step_that_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(is_main=True, steps=3, log_every=1)
    display.start(0)
    bad = dict.fromkeys(("lm_loss", "load_balancing_loss", "max_violation", "dropped_fraction", "val_loss"), math.nan)
    display.step(FIGURES | bad | {"val_unigram_entropy": 6.0, "val_bits_per_byte": math.nan})
    shown = capsys.readouterr().out
    assert "step 1/3 · lm_loss nan" in shown
    assert "validation loss nan nats" in shown


def test_a_run_without_an_accepted_step_is_an_error() -> None:
    guard = _guard(max_skipped=1000)
    for _ in range(3):
        _step(guard, StepResult(math.nan, SkipReason.not_finite))
    with pytest.raises(UserError, match=r"every step since the start was skipped: step 1 .*Nothing was learnt"):
        guard.check()
    _step(guard, StepResult(1.0, None))
    _step(guard, StepResult(math.nan, SkipReason.not_finite))
    guard.check()


def test_a_run_that_had_nothing_to_do_is_none() -> None:
    _guard().check()
