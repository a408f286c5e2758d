"""The tables of `moe bench time_to_loss`, the sides' sizes and its keys; its runs: tests/distributed."""

from __future__ import annotations

from typing import Any

import pytest

from moe.bench import gpt, run_bench, time_to_loss
from moe.config.compose import load_config
from moe.errors import UserError
from moe.plan.counts import parameter_parts

CONFIG = load_config(time_to_loss.PRESET)


def _rows(losses: list[float], seconds: float, violation: float | None) -> list[dict[str, Any]]:
    """Two steps for each loss; the second is evaluated."""
    row = {"step_seconds": seconds, "max_violation": violation}
    return [row | more for loss in losses for more in ({}, {"val_loss": loss})]


def test_tables_have_means_over_seeds_and_parts_of_the_run() -> None:
    runs = {
        "quickstart": [_rows([5, 4], 0.5, 0.2), _rows([6, 5], 0.5, 0.4)],
        "GPT": [_rows([7, 6], 1.0, None), _rows([7, 6], 1.0, None)],
    }
    results = time_to_loss.results(runs, CONFIG)
    whole, parts = results.tables
    tokens = 4 * CONFIG.train.global_batch_size * CONFIG.train.sequence_length
    assert whole.rows[0] == ["quickstart", 4, 2.0, tokens, 4.5, pytest.approx(0.7071, abs=1e-4), pytest.approx(0.3)]
    assert whole.rows[1] == ["GPT", 4, 4.0, tokens, 6, 0, None]
    assert parts.rows == [["quickstart", 5.5, 4.5], ["GPT", 7, 6]]
    assert list(results.lines())[-2:] == ["validation loss, GPT: 6.00", "validation loss, quickstart: 4.50"]


def test_sides_have_the_active_width_of_the_quickstart() -> None:
    parts, dense = parameter_parts(CONFIG), time_to_loss.sides_of(CONFIG)[2]
    width = parameter_parts(load_config([*time_to_loss.PRESET, *dense.keys]))
    routers = parts.shared + parts.active_experts - width.shared
    assert routers == CONFIG.model.num_hidden_layers * CONFIG.router.num_experts * CONFIG.model.hidden_size
    blocks = sum(one.numel() for name, one in gpt.Gpt(CONFIG).named_parameters() if ".h." in name)
    active = parts.shared + parts.active_experts - 2 * parts.embedding
    assert blocks == pytest.approx(active, rel=0.1)


@pytest.mark.parametrize(
    "override", ["run_dir=here", "train.seed=1", "train.eval_every=5", "train.steps=10", "rounds=0", "steps=3"]
)
def test_bad_keys(override: str) -> None:
    with pytest.raises(UserError, match=override.partition("=")[0]):
        run_bench(["time_to_loss", override])
