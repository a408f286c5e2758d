"""Leaving an expert out: its choices are dropped, the other weights keep their sum, nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe.analysis.leave_out import affordable, expert_left_out, leave_out, without
from moe.analysis.observe import observe, sparse_layers
from moe.sparse.routers.base import Choices
from tests.unit.analysis.made import model, text, uneven_model


def test_weights_keep_their_sum_where_a_choice_is_left() -> None:
    made = Choices.top_k(torch.tensor([[0, 1], [2, 0], [1, 2]]), torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]]))
    left = without(made, 0)
    assert left.per_token is None
    assert left.tokens_N.tolist() == [0, 1, 2, 2]
    assert left.experts_N.tolist() == [1, 2, 1, 2]
    assert left.weights_N.tolist() == pytest.approx([1.0, 1.0, 0.9, 0.1])
    assert without(Choices.top_k(torch.tensor([[0]]), torch.tensor([[1.0]])), 0).weights_N.tolist() == []


def test_the_loss_is_that_of_a_layer_computed_by_hand() -> None:
    made, sequences = model(layers=1), text(4)
    seen = observe(made, sequences, ["a", "b"])
    layer = sparse_layers(made)[0]
    found = leave_out(made, sequences, seen)
    gate = layer.gate.register_forward_hook(
        lambda _gate, _args, routed: setattr(routed, "choices", _by_hand(routed.choices, 2))
    )
    by_hand = observe(made, sequences, ["a", "b"])
    gate.remove()
    worth = found.experts[2]
    difference = by_hand.nats_B - seen.nats_B
    assert np.abs(difference).max() > 1e-3
    assert worth.rise == pytest.approx(difference.sum() / seen.targets_B.sum(), rel=1e-4)
    spread = sum((difference[source::2] / 11).var(ddof=1) for source in range(2)) * 2
    assert worth.error == pytest.approx(spread**0.5 / 4, rel=1e-4), "paired, 2 equal sequences of each source"
    assert worth.by_source["a"].value == pytest.approx(difference[::2].sum() / 22, rel=1e-4)
    assert worth.share == pytest.approx(float((seen.layers[0].experts_N == 2).mean()))


def _by_hand(choices: Choices, expert: int) -> Choices:
    """Top 2 with weights that sum to 1: where the expert was one of them, the other gets weight 1 and the expert 0."""
    experts_T2, weights_T2 = choices.experts_N.view(-1, 2), choices.weights_N.view(-1, 2)
    has_T1 = (experts_T2 == expert).any(1, keepdim=True)
    return Choices.top_k(experts_T2, torch.where(has_T1, (experts_T2 != expert).to(weights_T2.dtype), weights_T2))


def test_an_expert_that_nobody_chose_is_worth_nothing() -> None:
    made, sequences = model(layers=2), text(3)
    with torch.no_grad():  # −∞ times a positive input isn't possible: a row that is minus the sum of the others loses
        for layer in sparse_layers(made):
            layer.gate.weight[3] = 0
            layer.gate.weight[:3] = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).abs() * 10
            layer.gate.register_forward_pre_hook(lambda _gate, args: (args[0].abs() + 0.1, *args[1:]))
    found = leave_out(made, sequences, observe(made, sequences, ["a", "b"]))
    dead = [row for row in found.experts if row.expert == 3]
    assert [(row.share, row.rise, row.z) for row in dead] == [(0, 0, 0)] * 2


def test_the_model_is_as_before_afterwards() -> None:
    made, sequences = model(), text(2)
    before = observe(made, sequences, ["a", "b"]).nats_B
    with expert_left_out(sparse_layers(made)[1], 0):
        assert (observe(made, sequences, ["a", "b"]).nats_B != before).any()
    assert (observe(made, sequences, ["a", "b"]).nats_B == before).all()


def test_ragged_choices_and_a_tokens_only_expert() -> None:
    made, sequences = uneven_model(), text(3)
    found = leave_out(made, sequences, observe(made, sequences, ["a", "b"]))
    assert [(row.layer, row.expert) for row in found.experts] == [
        *((1, expert) for expert in range(4)), *((2, expert) for expert in range(6)), (3, 0), (3, 1),
    ]  # fmt: skip
    assert all(np.isfinite(row.rise) for row in found.experts)


def test_the_number_of_sequences_fits_the_budget() -> None:
    sequences = text(5)  # of 12 tokens
    assert affordable(sequences, 4, 4 * 12 * 3) == 3
    assert affordable(sequences, 4, 4 * 12 * 3 - 1) == 2
    assert affordable(sequences, 4, 10**9) == 5
    assert affordable(sequences, 4, 0) == 0
