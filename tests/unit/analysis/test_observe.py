"""What is observed is what the model does, for any router and any set of sparse layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe.analysis.observe import observe, sparse_layers
from moe.analysis.text import TextSequence
from moe.config import ExpertChoiceRouterConfig, ExpertsConfig
from moe.data.packing import NO_TARGET
from moe.sparse import build_sparse_mlp
from tests.unit.analysis.made import model, text, uneven_model


def test_choices_and_losses_are_those_of_one_sequence_at_a_time() -> None:
    made, sequences = model(), [*text(4), *text(2, length=8)]
    found = observe(made, sequences, ["a", "b"])
    start = 0
    for index, one in enumerate(sequences):
        ids_BS, labels_BS, documents_BS = (
            torch.from_numpy(part)[None] for part in (one.input_ids_L, one.labels_L, one.document_ids_L)
        )
        with torch.no_grad():
            output = made(ids_BS, document_ids_BS=documents_BS, labels_BS=labels_BS)
        assert found.nats_B[index] == pytest.approx(float(output.lm_loss_sum), rel=1e-5)
        length = ids_BS.shape[1]
        for layer, routed in zip(found.layers, output.routers, strict=True):
            own = (layer.tokens_N >= start) & (layer.tokens_N < start + length)
            assert (layer.experts_N[own] == routed.choices.experts_N.numpy()).all()
            assert layer.weights_N[own] == pytest.approx(routed.choices.weights_N.numpy(), abs=1e-5)
        start += length
    assert found.targets_B.tolist() == [11, 11, 11, 11, 7, 7]
    assert found.sources_B.tolist() == [0, 1, 0, 1, 0, 1]
    assert found.positions_T[:12].tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert len(np.unique(found.pieces_T)) == 12


def test_layers_are_the_models_own_and_may_differ() -> None:
    made = uneven_model()
    assert [layer.number for layer in sparse_layers(made)] == [1, 2, 3]
    found = observe(made, text(3), ["a", "b"])
    assert [(layer.layer, layer.num_experts, layer.most_choices) for layer in found.layers] == [
        (1, 4, 4), (2, 6, 3), (3, 2, 1),
    ]  # fmt: skip
    ragged = found.layers[0]
    assert ragged.taken_TE()[:6].sum(1).tolist() == [0, 1, 2, 3, 4, 0]
    assert ragged.taken_TE(2)[:6].sum(1).tolist() == [0, 1, 2, 2, 2, 0]
    assert ragged.first_T()[:6].tolist() == [-1, 0, 0, 0, 0, -1]


def test_expert_choice_reads_no_later_token() -> None:
    made, (one,) = model(), text(1, length=24)
    for block in made.model.layers:
        block.mlp = build_sparse_mlp(16, 24, ExpertChoiceRouterConfig(num_experts=4), ExpertsConfig())
    one.labels_L[12:] = NO_TARGET
    changed = TextSequence(
        one.source, np.append(one.input_ids_L[:12], one.input_ids_L[:12]), one.labels_L, one.document_ids_L
    )
    before, after = (observe(made.eval(), [sequence], ["a"]) for sequence in (one, changed))
    assert before.nats_B == pytest.approx(after.nats_B, rel=1e-6)
    for layer, other in zip(before.layers, after.layers, strict=True):
        assert (layer.taken_TE()[:12] == other.taken_TE()[:12]).all()
        assert (layer.taken_TE()[12:] != other.taken_TE()[12:]).any()


def test_a_sequence_of_one_token() -> None:
    one = TextSequence(0, np.array([5]), np.array([6]), np.zeros(1, np.int32))
    found = observe(model(), [one, one], ["a"])
    assert found.layers[0].num_tokens == 2
