"""`experts.fp8` computes the same on one process and on ranks that share experts.

Compared over the first steps only: sums in another order are other by a rounding, and a factor that is then rounded to
float8 differently is other by a sixteenth, which the following steps enlarge.
"""

from __future__ import annotations

import pytest

from tests.distributed.training import Training, build, config_of, engine_steps
from tests.ranks import run_ranks

FP8 = ["experts.fp8=true", "model.moe_intermediate_size=16"]
STEPS = 2


def _steps(overrides: list[str]) -> Training:
    config = config_of([*FP8, *overrides])
    mesh, engine = build(config, [])
    return engine_steps(config, mesh, engine, 0, STEPS)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ["parallel.expert_parallel_size=2", "parallel.zero_stage=2"]),
        (4, ["parallel.expert_parallel_size=2", "experts.exchange_chunks=2", "model.recompute=block"]),
    ],
    ids=str,
)
def test_ranks_equal_one_process(ranks: int, overrides: list[str]) -> None:
    alone = run_ranks(1, _steps, ["engine=plain", "parallel.zero_stage=1"], timeout=120)[0]
    unrounded = run_ranks(1, _steps, ["engine=plain", "parallel.zero_stage=1", "experts.fp8=false"], timeout=120)[0]
    assert alone.losses != pytest.approx(unrounded.losses, rel=1e-4)
    for result in run_ranks(ranks, _steps, overrides, timeout=120):
        assert result.losses == pytest.approx(alone.losses, rel=2e-6)
        assert result.norms == pytest.approx(alone.norms, rel=2e-4)
        assert result.counts == alone.counts
