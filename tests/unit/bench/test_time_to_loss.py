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
    rows = [row | more for loss in losses for more in ({}, {"val_loss": loss})]
    return [each | {"tokens": 100 * (step + 1)} for step, each in enumerate(rows)]


def test_tables_have_means_over_seeds_and_losses_against_seconds() -> None:
    runs = {
        "quickstart": [_rows([5, 4], 0.5, 0.2), _rows([6, 5], 0.5, 0.4)],
        "GPT": [_rows([7, 6], 1.0, None), _rows([7, 6], 1.0, None)],
    }
    results = time_to_loss.results(runs, ["a note"])
    whole, curves = results.tables
    assert whole.rows[0] == ["quickstart", 4, 2.0, 400, 4.5, pytest.approx(0.7071, abs=1e-4), pytest.approx(0.3)]
    assert whole.rows[1] == ["GPT", 4, 4.0, 400, 6, 0, None]
    assert curves.columns == ["seconds", "quickstart", "GPT"]
    assert curves.rows == [
        [0.5, None, None], [1.0, 5.5, None], [1.5, 5.5, None], [2.0, 4.5, 7],
        [2.5, 4.5, 7], [3.0, 4.5, 7], [3.5, 4.5, 7], [4.0, 4.5, 6],
    ]  # fmt: skip
    assert results.notes[0] == "a note"
    assert list(results.lines())[-2:] == ["validation loss, GPT: 6.00", "validation loss, quickstart: 4.50"]


def test_a_loss_counts_once_its_evaluation_is_over_and_for_all_seeds_or_none() -> None:
    early, late = _rows([5], 0.1, None), _rows([9], 0.3, None)
    assert [time_to_loss.loss_at(early, seconds) for seconds in (0.19, 0.2, 9)] == [None, 5, 5]
    rows = time_to_loss.against_seconds({"quickstart": [early, late]}).rows
    assert [loss for _, loss in rows] == [None] * 7 + [7]  # and not 5, the early seed's alone
    uneven = [{"step_seconds": 0.1}] * 29 + [{"step_seconds": 0.1, "val_loss": 3}]  # 30 × 0.1 is rounded
    assert time_to_loss.against_seconds({"quickstart": [uneven]}).rows[-1][1] == 3


def test_sides_are_chosen_by_name_and_by_key() -> None:
    chosen = time_to_loss.parse(["sides=gpt,router=lossfree,quickstart", "train.steps=10", "rounds=2", "optim.lr=1e-3"])
    assert [side.name for side in chosen.sides] == [
        f"GPT-2 of transformers, {gpt.layers_of(CONFIG)} layers", "quickstart, router=lossfree", "quickstart",
    ]  # fmt: skip
    assert chosen.sides[1].keys == ("router=lossfree",)
    assert (chosen.rounds, chosen.config.train.steps, chosen.overrides) == (2, 10, ["optim.lr=1e-3"])
    half = "train.micro_batch_size=4 train.global_batch_size=8"
    several = time_to_loss.parse([f"sides=quickstart,{half},data.packing=best_fit"]).sides
    assert [side.keys for side in several] == [(), tuple(half.split()), ("data.packing=best_fit",)]
    assert len(time_to_loss.parse([]).sides) == len(time_to_loss.SIDES) == 5


def test_a_sides_keys_come_after_all_sides() -> None:
    """So that the dense side keeps its width where the experts' is stated."""
    rest = ["model.intermediate_size=48", "optim=adamw"]
    dense, muon = time_to_loss.parse([*rest, "sides=dense,muon"]).sides
    assert load_config([*time_to_loss.PRESET, *rest, *dense.keys]).model.intermediate_size == 96
    assert load_config([*time_to_loss.PRESET, *rest, *muon.keys]).optim.kind.value == "muon"


def test_sides_have_the_active_width_of_the_quickstart() -> None:
    parts, dense = parameter_parts(CONFIG), time_to_loss.sides_of(CONFIG, ["dense"])[0]
    width = parameter_parts(load_config([*time_to_loss.PRESET, *dense.keys]))
    routers = parts.shared + parts.active_experts - width.shared
    assert routers == CONFIG.model.num_hidden_layers * CONFIG.router.num_experts * CONFIG.model.hidden_size
    blocks = sum(one.numel() for name, one in gpt.Gpt(CONFIG).named_parameters() if ".h." in name)
    active = parts.shared + parts.active_experts - 2 * parts.embedding
    assert blocks == pytest.approx(active, rel=0.1)


@pytest.mark.parametrize(
    "override",
    [
        "run_dir=here",
        "train.seed=1",
        "train.eval_every=5",
        "rounds=0",
        "steps=3",
        "sides=quickstart,moun is none of quickstart, muon",
        "sides=muon,muon names muon twice",
        "sides= is none of",
        "sides=quickstart,train.steps=5: the benchmark sets it itself",
        "sides=quickstart,model.vocab_size=4096 changes the held-out tokens",
        "sides=quickstart,router=losfree",
    ],
)
def test_bad_keys(override: str) -> None:
    key = override.split(" ")[0].removesuffix(":")
    with pytest.raises(UserError) as caught:
        run_bench(["time_to_loss", key])
    assert "\n" not in str(caught.value)
    assert (override.partition(" ")[2] or key.split("=")[-2].split(",")[-1]) in str(caught.value)


@pytest.mark.parametrize("name", ["optim=muon train.steps", "optim=muon  optim.lr=4e-3", "router=lossfree "])
def test_bad_sides_of_several_keys(name: str) -> None:
    with pytest.raises(UserError, match=f"sides=quickstart,{name}: {name} is none of quickstart"):
        time_to_loss.parse([f"sides=quickstart,{name}"])
