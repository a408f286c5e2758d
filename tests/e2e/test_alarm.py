"""A real run that collapses: the alarm names the layer and the expert in every place, and ends the run if asked to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe.config.compose import load_config
from moe.errors import UserError
from moe.train import loop
from moe.train.setup import TrainingRun
from tests.alarm_trials import EXPERT, LAYER, attract_all
from tests.e2e.conftest import SMALL, read_metrics
from tests.ranks import run_ranks

BROKEN_AT = 25


def _train(overrides: list[str]) -> str:
    """The run's last word, or "finished"; a router row attracts all tokens from step BROKEN_AT on."""
    step = loop._step

    def breaking(run: TrainingRun) -> Any:
        if run.state.step == BROKEN_AT - 1:
            attract_all(run)
        return step(run)

    loop._step = breaking
    try:
        loop.train(load_config(overrides))
    except UserError as error:
        return str(error)
    return "finished"


@pytest.mark.parametrize("stop", [False, True])
def test_a_router_row_that_attracts_all(stop: bool, corpus: list[str], tmp_path: Path) -> None:
    overrides = [*corpus, *SMALL, f"run_dir={tmp_path / 'run'}", "engine=plain", "alarm.after=20"]
    (said,) = run_ranks(1, _train, [*overrides, f"alarm.stop={str(stop).lower()}", "router.aux_loss_coef=0.05"])
    rows = read_metrics(tmp_path / "run")
    alarms: list[Any] = [one | {"step": row["step"]} for row in rows for one in row.get("new_alarms", [])]  # type: ignore[attr-defined]
    ours = [one for one in alarms if one["step"] >= BROKEN_AT and (one["layer"], one["expert"]) == (LAYER, EXPERT)]
    assert ours
    assert ours[0]["step"] < BROKEN_AT + 10
    assert ours[0]["since"] >= BROKEN_AT
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"<b>layer {LAYER}, expert {EXPERT}</b>" in page
    if stop:
        assert said.startswith(f"alarm: step {alarms[0]['step']}: layer ")
        assert rows[-1]["step"] == alarms[0]["step"]
    else:
        assert said == "finished"
        assert rows[-1]["alarms"]
