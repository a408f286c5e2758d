"""The back-end that `auto` takes: measured with real candidates on this CPU, by a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from moe.config import ExpertBackend, ExpertsConfig
from moe.errors import UserError
from moe.kernels import expert_backends
from moe.kernels.expert_backends import (
    FFN,
    ROUNDS,
    BackendTimes,
    ExpertLoad,
    candidates,
    fastest,
    is_unmeasured,
    measure,
    resolve_backend,
    take,
)
from moe.kernels.grouped_swiglu import grouped_ffn

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LOOP, GROUPED, TRITON, EACH = (getattr(ExpertBackend, name) for name in ("loop", "grouped_mm", "triton", "per_expert"))
LOAD, SHAPES = ExpertLoad(16, 24, 4, 40), (16, 24)
TRIED: dict[ExpertBackend, FFN] = {one: partial(grouped_ffn, backend=one) for one in (GROUPED, EACH, LOOP)}


@pytest.fixture
def no_routes() -> Iterator[None]:
    expert_backends._routes.clear()
    yield
    expert_backends._routes.clear()


class Clock:
    """Runs what it times, and says that the candidates, which come in turns, take these times; one is interrupted."""

    def __init__(self, *milliseconds: float) -> None:
        self.milliseconds, self.calls = milliseconds, 0

    def __call__(self, action: Callable[[], None]) -> float:
        action()
        self.calls += 1
        return 1e6 if self.calls == 2 else self.milliseconds[(self.calls - 1) % len(self.milliseconds)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_candidates_are_compared_and_timed_in_turns(dtype: torch.dtype) -> None:
    clock = Clock(30.0, 12.0, 60.0)
    times = measure(TRIED, LOAD, CPU, dtype, clock)
    assert times == BackendTimes({GROUPED: 10.0, EACH: 4.0, LOOP: 20.0}, {})  # of one call; a slow round is left out
    assert clock.calls == 3 * ROUNDS


def test_what_is_wrong_or_fails_is_left_out() -> None:
    def slightly_wrong(x_NH: Tensor, counts_E: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return grouped_ffn(x_NH, counts_E, gate_up, down, GROUPED) * 1.001

    def fails(*tensors: Tensor) -> Tensor:
        raise RuntimeError("no kernel image\nis available")

    def fails_at_size(x_NH: Tensor, *tensors: Tensor) -> Tensor:
        if len(x_NH) == LOAD.rows:
            raise torch.OutOfMemoryError("too much")
        return grouped_ffn(x_NH, *tensors, GROUPED)

    tried = {GROUPED: slightly_wrong, TRITON: fails, EACH: fails_at_size, LOOP: TRIED[LOOP]}
    times = measure(tried, LOAD, CPU, torch.float32, Clock(3.0))
    assert list(times.milliseconds) == [LOOP]
    assert times.left_out == {
        GROUPED: "its error is 1.0e-03",
        TRITON: "RuntimeError: no kernel image",
        EACH: "OutOfMemoryError: too much",
    }


def test_undefined_results_are_wrong() -> None:
    tried: dict[ExpertBackend, FFN] = {GROUPED: lambda *tensors: TRIED[GROUPED](*tensors) * float("nan")}
    times = measure(tried, LOAD, CPU, torch.float32, Clock(1.0))
    assert times == BackendTimes({}, {GROUPED: "its error is nan"})


def test_the_first_stays_unless_another_is_clearly_faster() -> None:
    assert fastest({GROUPED: 10.0, TRITON: 9.9, EACH: 30.0}) is GROUPED
    assert fastest({GROUPED: 10.0, TRITON: 9.4, EACH: 9.0}) is EACH
    assert fastest({TRITON: 1.0}) is TRITON


@pytest.mark.parametrize(("experts", "rows"), [(1, 7), (2, 64), (8, 1001), (16, 3)])
def test_the_rows_of_a_load(experts: int, rows: int) -> None:
    counts = ExpertLoad(8, 8, experts, rows).counts
    assert len(counts) == experts
    assert sum(counts) == rows
    assert counts[0] <= counts[-1]


@pytest.mark.usefixtures("no_routes")
def test_all_ranks_take_the_fastest_of_the_slowest_rank_that_runs_on_all() -> None:
    ranks = [
        BackendTimes({GROUPED: 10.0, TRITON: 5.0, EACH: 2.0}, {}),
        BackendTimes({GROUPED: 10.0, TRITON: 8.0}, {EACH: "RuntimeError: no memory"}),
    ]
    config, asked = ExpertsConfig(), (CUDA, torch.bfloat16, SHAPES)
    assert is_unmeasured(config, *asked)
    take(ranks, CUDA, torch.bfloat16, LOAD)
    assert resolve_backend(config, *asked) == (
        TRITON,
        "triton 8 ms; grouped_mm 10 ms; per_expert left out: RuntimeError: no memory; "
        "forward and backward of 40 rows on 4 experts",
    )
    assert not is_unmeasured(config, *asked)
    assert is_unmeasured(config, CUDA, torch.bfloat16, (16, 32))
    # What is measured is `auto`'s, for one device, dtype and shapes; float8 factors are grouped_mm's.
    other = resolve_backend(ExpertsConfig(backend=EACH), *asked)
    assert other == (EACH, "set by experts.backend")
    assert not is_unmeasured(ExpertsConfig(backend=EACH), CUDA, torch.bfloat16, (16, 32))
    assert not is_unmeasured(ExpertsConfig(fp8=True), CUDA, torch.bfloat16, (16, 32))
    assert resolve_backend(config, CPU, torch.bfloat16, SHAPES)[0] is GROUPED


@pytest.mark.usefixtures("no_routes")
def test_float8_factors_keep_grouped_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    take([BackendTimes({TRITON: 1.0}, {})], CUDA, torch.bfloat16, LOAD)
    assert resolve_backend(ExpertsConfig(), CUDA, torch.bfloat16, SHAPES)[0] is TRITON
    assert resolve_backend(ExpertsConfig(fp8=True), CUDA, torch.bfloat16, SHAPES)[0] is GROUPED


@pytest.mark.usefixtures("no_routes")
def test_without_a_candidate_auto_stays_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    take([BackendTimes({TRITON: 1.0}, {}), BackendTimes({}, {})], CUDA, torch.bfloat16, LOAD)
    asked = ExpertsConfig(), CUDA, torch.bfloat16, SHAPES
    assert resolve_backend(*asked) == (GROUPED, "not timed beside others")


def test_a_cpu_has_nothing_to_measure() -> None:
    assert not is_unmeasured(ExpertsConfig(), CPU, torch.float32, SHAPES)
    assert list(candidates(CPU, torch.float32, SHAPES)) == [GROUPED, EACH]
    assert resolve_backend(ExpertsConfig(backend=EACH), CPU, torch.float32, SHAPES)[0] is EACH


def test_triton_without_cuda_is_one_line() -> None:
    with pytest.raises(UserError) as error:
        resolve_backend(ExpertsConfig(backend=TRITON), CPU, torch.bfloat16, SHAPES)
    assert str(error.value) == (
        "experts.backend=triton can't run Triton's kernels here: they need CUDA; use experts.backend=auto"
    )
