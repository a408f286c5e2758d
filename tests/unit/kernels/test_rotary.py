"""Rotation: against complex multiplication in float64, transformers' table, and autograd."""

import pytest
import torch

from moe.kernels.rotary import (
    RotaryTables,
    project_rotated,
    project_rotated_reference,
    rotary_table,
    rotate,
    rotated,
    rotated_reference,
)

CPU = torch.device("cpu")


def test_equals_complex_multiplication_in_float64():
    """Dimensions i and i + D/2 are the real and imaginary parts that position p rotates by p · theta^(−2i/D)."""
    x = torch.randn(2, 40, 3, 8, dtype=torch.float64)
    numbers = torch.complex(x[..., :4], x[..., 4:])
    angles = torch.arange(100, 140, dtype=torch.float64)[:, None] * 500.0 ** (-torch.arange(0, 8, 2).double() / 8)
    turned = numbers * torch.polar(torch.ones_like(angles), angles)[:, None]
    actual = rotate(x, rotary_table(100, 40, 8, 500.0, CPU, torch.float64))
    # The angles are float32 products, with an error of up to 140 · 2⁻²⁴.
    torch.testing.assert_close(actual, torch.cat((turned.real, turned.imag), -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("start", [0, 1000])
def test_table_is_transformers(start):
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

    config = transformers.MixtralConfig(hidden_size=64, num_attention_heads=4, rope_theta=1e6)
    positions = torch.arange(start, start + 50)[None]
    cos, sin = MixtralRotaryEmbedding(config)(torch.zeros(1), positions)
    table = rotary_table(start, 50, 16, 1e6, CPU, torch.float32)
    assert torch.equal(table.cos_S1D[:, 0], cos[0])
    assert torch.equal(table.sin_S1D[:, 0].abs(), sin[0].abs())


SCALED = [
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 20, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "truncate": False},
]


@pytest.mark.parametrize("scaling", SCALED, ids=str)
def test_scaled_table_is_transformers(scaling):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {**scaling, "original_max_position_embeddings": 64}
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, rope_parameters={**scaling, "rope_theta": 5e5}
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(30, 330)[None])
    table = rotary_table(30, 300, 64, 5e5, CPU, torch.float32, scaling)
    plain = rotary_table(30, 300, 64, 5e5, CPU, torch.float32)
    torch.testing.assert_close(table.cos_S1D[:, 0], cos[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(table.sin_S1D[:, 0].abs(), sin[0].abs(), rtol=0, atol=1e-6)
    assert (table.cos_S1D - plain.cos_S1D).abs().max() > 0.1


def test_back_undoes_it():
    x = torch.randn(1, 9, 2, 6, dtype=torch.float64)
    table = rotary_table(3, 9, 6, 1e4, CPU, torch.float64)
    torch.testing.assert_close(rotate(rotate(x, table), table, back=True), x)


def test_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    scores = []
    for position in (0, 7, 200):
        turned_q = rotate(q, rotary_table(position + 5, 1, 16, 1e4, CPU, torch.float64))
        turned_k = rotate(k, rotary_table(position, 1, 16, 1e4, CPU, torch.float64))
        scores.append((turned_q * turned_k).sum())
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), rtol=1e-4, atol=1e-4)


def _projection(frozen: bool = False):
    generator = torch.Generator().manual_seed(0)
    x, q, k, v = (
        torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in ((2, 5, 7), (12, 7), (8, 7), (8, 7))
    )
    for weight in (q, k, v):
        weight.requires_grad_(not frozen)
    return x, q, k, v, rotary_table(2, 5, 4, 1e4, CPU, torch.float64)


def test_projection_equals_the_reference():
    *inputs, table = _projection()
    outcomes = []
    for function in (project_rotated, project_rotated_reference):
        q, k, v = function(*inputs, table)
        loss = (q * 0.3).square().sum() + (k * q[:, :, :2]).sum() + v.tanh().sum()
        outcomes.append([q, k, v, *torch.autograd.grad(loss, inputs)])
    for mine, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, other)


def test_rotation_equals_the_reference():
    x, table = (
        torch.randn(2, 9, 3, 8, dtype=torch.float64, requires_grad=True),
        rotary_table(4, 9, 8, 1e4, CPU, torch.float64),
    )
    outcomes = []
    for function in (rotated, rotated_reference):
        y = function(x, table)
        outcomes.append([y, *torch.autograd.grad(y.square().sum() + y.sum(), x)])
    for mine, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, other)


def test_tables_are_slices_of_a_longer_one():
    """Slices equal, bit for bit, a table of those positions; only another dtype or more positions recompute it."""
    tables = RotaryTables(16, 1e4)
    for dtype in (torch.float32, torch.bfloat16):
        for start, length in ((0, 7), (0, 333), (17, 100), (500, 1), (501, 1), (502, 90)):
            mine, alone = tables(start, length, CPU, dtype), rotary_table(start, length, 16, 1e4, CPU, dtype)
            assert torch.equal(mine.cos_S1D, alone.cos_S1D)
            assert torch.equal(mine.sin_S1D, alone.sin_S1D)
    memory = {tables(start, 1, CPU, torch.bfloat16).cos_S1D.untyped_storage().data_ptr() for start in range(592, 660)}
    assert len(memory) == 1


def test_projection_gradients():
    x, q, k, v, table = _projection()
    assert torch.autograd.gradcheck(lambda *t: project_rotated(*t, table), (x, q, k, v))


def test_frozen_projection_still_passes_gradients_on():
    tensors = _projection(frozen=True)
    assert torch.autograd.gradcheck(lambda x: project_rotated(x, *tensors[1:]), tensors[:1])
