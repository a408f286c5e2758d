"""Cosines of experts: what reordered hidden units change, and what they don't."""

from __future__ import annotations

import math

import pytest
import torch

from moe.analysis.observe import sparse_layers
from moe.analysis.similarity import output_cosines, similarities, weight_cosines
from tests.unit.analysis.made import model, text, uneven_model


def test_a_copy_a_reordered_copy_and_the_opposite() -> None:
    layer = sparse_layers(model(layers=1))[0]
    experts, order = layer.mlp.experts, torch.randperm(24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gate_up, down = experts.gate_up_proj, experts.down_proj
        gate_up[1], down[1] = gate_up[0], down[0]
        gate_up[2], down[2] = torch.cat([gate_up[0, :24][order], gate_up[0, 24:][order]]), down[0][:, order]
        gate_up[3], down[3] = gate_up[0], -down[0]
    weights_EE = weight_cosines(layer)
    outputs_EE = output_cosines(layer, torch.randn(40, 16, generator=torch.Generator().manual_seed(1)))
    assert weights_EE.diagonal().tolist() == pytest.approx([1] * 4)
    assert float(weights_EE[0, 1]) == pytest.approx(1, abs=1e-5)
    assert float(weights_EE[0, 2]) < 0.5, "the same function looks like another"
    assert outputs_EE[0].tolist() == pytest.approx([1, 1, 1, -1], abs=1e-4)


def test_weights_of_all_parameters_as_one_vector() -> None:
    layer = sparse_layers(model(layers=1))[0]
    experts = layer.mlp.experts
    flat = torch.cat([experts.gate_up_proj.flatten(1), experts.down_proj.flatten(1)], 1).detach()
    expected = torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0)
    assert float(weight_cosines(layer)[0, 1]) == pytest.approx(float(expected), abs=1e-5)


def test_layers_of_other_numbers_of_experts() -> None:
    found = similarities(uneven_model(), text(3))
    assert [(row.layer, len(row.weights_EE), len(row.outputs_EE)) for row in found] == [(1, 4, 4), (2, 6, 6), (3, 2, 2)]
    assert all(row.tokens == 36 and not math.isnan(row.mean_outputs) for row in found)
