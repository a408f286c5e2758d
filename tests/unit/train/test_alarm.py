"""The collapse alarm on made metrics: what it names, when, what it leaves alone, and that a resume changes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from moe.checkpoint.state import TrainState, read_state
from moe.config.train import AlarmConfig
from moe.errors import UserError
from moe.train.alarm import FAST, LIMITS, LOW, QUIET, SETTLED, STARVED, WINDOW, Alarm

LAYERS = [1, 3]  # the blocks that are sparse
EXPERTS = 4
Change = Callable[[dict[str, Any], int], None]


def _row(step: int) -> dict[str, Any]:
    """A healthy step: loads waver, an evaluation every tenth step."""
    waver = 0.1 * math.sin(step)
    shares = [0.25 + waver, 0.25 - waver, 0.25, 0.25]
    row = {
        "step": step,
        "expert_shares": [shares, shares[::-1]],
        "load_concentration_layers": [0.3 + waver, 0.2],
        "router_entropy_of_mean_layers": [0.98, 0.97],
        "router_update_norm_layers": [0.01 + 0.1 * abs(waver) * 0.1, 0.0 if step < 50 else 1.0 / step],
        "router_bias": [[0.1, -0.1, 0.0, 0.0]] * 2,
    }
    return row | ({"expert_output_norm": [[1.0, 1.1, 2.0, 0.9], [0.1, 0.2, 0.1, 0.2]]} if step % 10 == 0 else {})


def _crowd(row: dict[str, Any], step: int) -> None:
    row["expert_shares"][1] = [0.02, 0.03, 0.9, 0.05]
    row["load_concentration_layers"][1] = 1.0


def _oscillate(row: dict[str, Any], step: int) -> None:
    row["expert_shares"][0] = [0.97, 0.01, 0.01, 0.01] if step % 2 else [0.01, 0.97, 0.01, 0.01]
    row["load_concentration_layers"][0] = 1.0


def _unmix(row: dict[str, Any], step: int) -> None:
    row["router_entropy_of_mean_layers"][0] = 0.5


def _starve(row: dict[str, Any], step: int) -> None:
    row["expert_shares"][0] = [0.4, 0.3, 0.299, 0.001]


def _bias(row: dict[str, Any], step: int) -> None:
    row["router_bias"] = [[0.1, -0.1, 0.0, 0.0], [0.0, 2.0, 0.1, 0.0]]


def _haste(row: dict[str, Any], step: int) -> None:
    row["router_update_norm_layers"][1] *= 10


def _norm(factor: float) -> Change:
    def change(row: dict[str, Any], step: int) -> None:
        if "expert_output_norm" in row:
            row["expert_output_norm"][1][3] *= factor

    return change


def _judged(
    change: Change | None = None, start: int = 300, steps: int = 400, alarm: Alarm | None = None, first: int = 1
) -> list[dict[str, Any]]:
    """Every alarm of a run that `change` breaks from `start` on, with the step at which it was given."""
    alarm = alarm or Alarm(AlarmConfig(), TrainState(), LAYERS, lambda _: None)
    found = []
    for step in range(first, steps + 1):
        row = _row(step)
        if change is not None and step >= start:
            change(row, step)
        found += [one | {"step": step} for one in alarm.judge(row).get("new_alarms", [])]
    return found


def test_a_healthy_run_has_no_alarm() -> None:
    assert _judged() == []


BROKEN = {
    # what breaks: (layer, expert, metric, steps until the alarm at most)
    "crowded": (_crowd, 3, 2, "load_concentration", WINDOW),
    "oscillating": (_oscillate, 1, None, "load_concentration", WINDOW),
    "unmixed": (_unmix, 1, None, "router_entropy_of_mean", LOW),
    "starved": (_starve, 1, 3, "expert_share", STARVED),
    "biased": (_bias, 3, 1, "router_bias_range", 1),
    "hasty": (_haste, 3, None, "router_update_norm", FAST),
    "zeroed": (_norm(0.0), 3, 3, "expert_output_norm", 1),
    "loud": (_norm(30.0), 3, 3, "expert_output_norm", 1),
    "not finite": (_norm(math.inf), 3, 3, "expert_output_norm", 1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_it_names_layer_expert_metric_and_since_when(name: str) -> None:
    change, layer, expert, metric, delay = BROKEN[name]
    (found,) = _judged(change, start=300)
    assert (found["layer"], found["metric"]) == (layer, metric)
    assert expert in (None, found["expert"])
    assert 300 <= found["step"] < 300 + delay
    since = 291 if metric == "expert_output_norm" else 300  # after the last good evaluation
    assert found["since"] == since


def test_the_text_says_it_in_one_line() -> None:
    said: list[str] = []
    _judged(_crowd, alarm=Alarm(AlarmConfig(), TrainState(), LAYERS, said.append))
    (text,) = said
    assert text.startswith("alarm: step 308: layer 3, expert 2: load_concentration is 0.92 ")
    assert text.endswith("of the largest possible overload, since step 300")


def test_a_start_that_looks_collapsed_is_no_alarm() -> None:
    def until_150(row: dict[str, Any], step: int) -> None:
        if step <= 150:
            _crowd(row, step)

    assert _judged(until_150, start=1) == []


def test_what_never_settles_is_found_when_the_alarm_is_armed_late() -> None:
    (found,) = _judged(_crowd, start=1)
    assert (found["step"], found["since"]) == (AlarmConfig().after, 1)


def test_once_settled_it_is_armed_before_that() -> None:
    (found,) = _judged(_crowd, start=SETTLED + 1, steps=200)
    assert found["step"] <= SETTLED + WINDOW


def test_a_router_that_wakes_up_is_no_alarm() -> None:
    def frozen_until_300(row: dict[str, Any], step: int) -> None:
        row["router_update_norm_layers"][0] = 0.0 if step < 300 else 0.01

    assert _judged(frozen_until_300, start=1) == []


def test_noise_is_no_alarm() -> None:
    def now_and_then(row: dict[str, Any], step: int) -> None:
        if step % WINDOW < 2:
            _crowd(row, step)
        if step % STARVED:
            _starve(row, step)

    assert _judged(now_and_then, start=1) == []


def test_a_norm_that_drifts_is_no_alarm() -> None:
    def drift(row: dict[str, Any], step: int) -> None:
        _norm(1.5 ** (step / 10))(row, step)

    assert _judged(drift, start=1, steps=200) == []


def test_an_alarm_stands_until_its_cause_was_away_for_a_while_and_begins_once() -> None:
    def for_thirty_steps(row: dict[str, Any], step: int) -> None:
        if step < 330 or step == 340:
            _bias(row, step)

    alarm, standing = Alarm(AlarmConfig(), TrainState(), LAYERS, lambda _: None), {}
    for step in range(1, 400):
        row = _row(step)
        if step >= 300:
            for_thirty_steps(row, step)
        standing[step] = alarm.judge(row)
    assert [step for step, found in standing.items() if "new_alarms" in found] == [300]
    assert [step for step, found in standing.items() if found["alarms"]] == list(range(300, 340 + QUIET))


@pytest.mark.parametrize("until", [math.inf, 500])
def test_an_output_norm_stands_between_evaluations_until_one_finds_it_good(until: float) -> None:
    alarm, standing = Alarm(AlarmConfig(), TrainState(), LAYERS, lambda _: None), {}
    for step in range(1, 700):
        row = _row(step)
        if 300 <= step < until:
            _norm(0.0)(row, step)
        if step % 50:
            row.pop("expert_output_norm", None)
        standing[step] = alarm.judge(row)
    new = [(step, one["since"]) for step, found in standing.items() for one in found.get("new_alarms", [])]
    assert new == [(300, 251)]
    ends = min(700, until - 1 + QUIET)
    assert [step for step, found in standing.items() if found["alarms"]] == list(range(300, int(ends)))


def test_a_norm_is_broken_since_the_last_evaluation_that_found_it_good() -> None:
    def unserved_and_then_zero(row: dict[str, Any], step: int) -> None:
        _norm(math.nan if step < 300 else 0.0)(row, step)

    (found,) = _judged(unserved_and_then_zero, start=281)
    assert (found["step"], found["since"]) == (300, 281)


def test_weights_that_are_not_finite_are_an_alarm_at_once() -> None:
    alarm = Alarm(AlarmConfig(), TrainState(), LAYERS, lambda _: None)
    (found,) = alarm.judge(_row(1), [(1, 2)])["new_alarms"]
    assert (found["layer"], found["expert"], found["metric"], found["since"]) == (3, 2, "expert_weights", 1)


@pytest.mark.parametrize("cut", [5, 150, 295, 303, 312, 325])
@pytest.mark.parametrize("name", BROKEN)
def test_a_resume_decides_as_if_there_had_been_no_break(name: str, cut: int, tmp_path: Path) -> None:
    change = BROKEN[name][0]
    state = TrainState()
    before = _judged(change, steps=cut, alarm=Alarm(AlarmConfig(), state, LAYERS, lambda _: None))
    (tmp_path / "state.json").write_text(json.dumps(asdict(state)))
    resumed = Alarm(AlarmConfig(), read_state(tmp_path), LAYERS, lambda _: None)
    assert before + _judged(change, alarm=resumed, first=cut + 1) == _judged(change)


def test_a_model_with_other_experts_starts_anew() -> None:
    state = TrainState(alarm={"experts": [2, 2, 2]})
    assert _judged(_bias, alarm=Alarm(AlarmConfig(), state, LAYERS, lambda _: None))
    assert state.alarm["experts"] == [EXPERTS] * 2


def test_alarm_stop_ends_the_run_with_one_line() -> None:
    alarm = Alarm(AlarmConfig(stop=True), TrainState(), LAYERS, lambda _: None)
    _judged(alarm=alarm)
    assert not alarm.stops
    alarm.check()
    _judged(_crowd, alarm=alarm, first=401, steps=420)
    assert alarm.stops
    with pytest.raises(UserError, match=r"layer 3, expert 2: load_concentration .*stopped by alarm.stop=true"):
        alarm.check()


def test_off_and_dense_models_have_no_alarm() -> None:
    off = Alarm(AlarmConfig(after=None), TrainState(), LAYERS, lambda _: None)
    assert off.judge(_row(300)) == {}
    dense = Alarm(AlarmConfig(), TrainState(), [], lambda _: None)
    assert dense.judge({"step": 1, "expert_shares": []}) == {}


def test_every_limit_is_tried() -> None:
    assert {metric for *_, metric, _ in BROKEN.values()} == LIMITS.keys()


def test_alarm_stop_needs_an_alarm() -> None:
    with pytest.raises(UserError, match=r"alarm.stop=true needs an alarm"):
        AlarmConfig(after=None, stop=True)
