"""Rotation: against complex multiplication in float64, transformers' table, and autograd."""

import pytest
import torch

from moe.kernels.rotary import project_rotated, rotary_table, rotate

CPU = torch.device("cpu")


def test_equals_complex_multiplication_in_float64():
    """Dimension i and i + D/2 are the real and imaginary part that position p turns by p · theta^(−2i/D)."""
    x = torch.randn(2, 40, 3, 8, dtype=torch.float64)
    numbers = torch.complex(x[..., :4], x[..., 4:])
    angles = torch.arange(100, 140, dtype=torch.float64)[:, None] * 500.0 ** (-torch.arange(0, 8, 2).double() / 8)
    turned = numbers * torch.polar(torch.ones_like(angles), angles)[:, None]
    actual = rotate(x, rotary_table(100, 40, 8, 500.0, CPU, torch.float64))
    # The angles are float32 products: up to 140 · 2⁻²⁴ off.
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


def test_projection_equals_three_linears():
    x, q, k, v, table = _projection()
    actual = project_rotated(x, q, k, v, table)
    plain = [(x @ weight.T).detach().unflatten(-1, (-1, 4)) for weight in (q, k, v)]
    for mine, other in zip(actual, (rotate(plain[0], table), rotate(plain[1], table), plain[2]), strict=True):
        torch.testing.assert_close(mine, other)


def test_projection_gradients():
    x, q, k, v, table = _projection()
    assert torch.autograd.gradcheck(lambda *t: project_rotated(*t, table), (x, q, k, v))


def test_frozen_projection_still_passes_gradients_on():
    tensors = _projection(frozen=True)
    assert torch.autograd.gradcheck(lambda x: project_rotated(x, *tensors[1:]), tensors[:1])
