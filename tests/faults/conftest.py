"""Tests of faults in a training run, each of which belongs to a row of docs/reliability.md (tests/fault_table.py)."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import corpus, moe
from tests.faults.forked import moe_ranks
from tests.faults.live import OVERRIDES

__all__ = ["corpus", "moe"]


@pytest.fixture(scope="session")
def undisturbed(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`undisturbed(ranks, *overrides)`: the directory of a finished run without faults, to compare others with."""
    made: dict[tuple[int, tuple[str, ...]], Path] = {}

    def run(ranks: int, *overrides: str) -> Path:
        if (ranks, overrides) not in made:
            run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
            done = moe_ranks(*OVERRIDES, *corpus, *overrides, f"run_dir={run_dir}", ranks=ranks)
            assert [one.code for one in done] == [0] * ranks, done[0].err
            made[ranks, overrides] = run_dir
        return made[ranks, overrides]

    return run
