"""A layer on sequences that are filled up equals the layer on each sequence without its padding, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.config import ExpertBackend, ExpertsConfig, RouterConfig
from moe.config.compose import load_config
from moe.sparse import Randomness, RealTokens, RouterOutput, SparseMLP, build_sparse_mlp
from moe.sparse.diagnostics import DIAGNOSTICS

HIDDEN, INNER, LENGTHS = 16, 24, (5, 11, 0, 3)
ROUTERS = {
    "mixtral": ["router.z_loss_coef=0.1", "router.variance_loss_coef=0.1"],
    "each sequence": ["router.aux_loss_coef=0", "router.sequence_aux_loss_coef=0.1", "router.scoring_func=sigmoid"],
    "global batch": ["router.global_aux_loss_coef=0.1"],
    "capacity by position": ["router.capacity_factor=0.8", "router.num_experts=4"],
    "capacity by probability": [
        "router.capacity_factor=0.8", "router.num_experts=4", "router.drop_policy=probability",
    ],
    "jitter": ["router=switch", "router.capacity_factor=1.5"],
    "noisy": ["router=noisy_topk"],
    "gumbel": ["router=gumbel"],
    "groups": ["router=deepseek_v3"],
    "expert choice": ["router=expert_choice", "router.z_loss_coef=0.1"],
}  # fmt: skip


def _layer(overrides: list[str], backend: ExpertBackend = ExpertBackend.auto) -> SparseMLP:
    config: RouterConfig = load_config(overrides).router
    layer = build_sparse_mlp(HIDDEN, INNER, config, ExpertsConfig(backend=backend))
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return layer.double().train()


def _real(lengths: tuple[int, ...], longest: int) -> RealTokens:
    places = [torch.arange(number * longest, number * longest + size) for number, size in enumerate(lengths)]
    return RealTokens(torch.cat(places), len(lengths), longest)


def _input(longest: int) -> Tensor:
    x_BSH = torch.randn(len(LENGTHS), 13, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    more_BSH = torch.full((len(LENGTHS), max(0, longest - 13), HIDDEN), 7.0, dtype=torch.float64)
    return torch.cat([x_BSH, more_BSH], dim=1)[:, :longest]


def _gradients(layer: SparseMLP, total: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, list(layer.parameters()), allow_unused=True, materialize_grads=True))


def _weighed(y_TH: Tensor, routed: RouterOutput) -> Tensor:
    """A loss that depends on all of it."""
    return y_TH.square().sum() + sum(loss.value for loss in routed.losses.values())


@pytest.mark.parametrize("longest", [13, 29])
@pytest.mark.parametrize("overrides", ROUTERS.values(), ids=ROUTERS.keys())
def test_padding_changes_nothing(overrides: list[str], longest: int) -> None:
    layer, real = _layer(overrides), _real(LENGTHS, longest)
    samples_B = torch.arange(len(LENGTHS))
    x_BSH = _input(longest).requires_grad_()
    y_BSH, routed = layer(x_BSH, Randomness.of(0, 0, samples_B), real)
    assert not y_BSH.flatten(0, 1)[real.spread(torch.ones_like(real.places_T)) == 0].any()
    assert routed.choices.num_tokens == len(routed.logits_TE) == len(routed.probs_TE) == sum(LENGTHS)
    outputs, parts = [], []
    for sequence, size in enumerate(LENGTHS):
        if size:
            alone_BSH = _input(longest)[sequence : sequence + 1, :size]
            y, one = layer(alone_BSH, Randomness.of(0, 0, samples_B[sequence : sequence + 1]))
            outputs.append(y[0])
            parts.append(one)
    assert torch.allclose(real.select(y_BSH.flatten(0, 1)), torch.cat(outputs), atol=1e-12)
    assert torch.equal(routed.counts_E, torch.stack([part.counts_E for part in parts]).sum(0))
    assert int(routed.dropped) == sum(int(part.dropped) for part in parts)
    assert int(routed.dropped) > 0 or "router.capacity_factor=0.8" not in overrides
    sizes = torch.tensor([size for size in LENGTHS if size], dtype=torch.float64)
    means = {"router_z_loss", "sequence_balancing_loss"}  # means over tokens; f P and variances aren't
    for name, loss in routed.losses.items():
        if name in means:
            values = torch.stack([part.losses[name].value.detach() for part in parts])
            assert float(loss.value.detach()) == pytest.approx(float((values * sizes).sum() / sum(LENGTHS)), rel=1e-9)
    for name, value in routed.diagnostics.items():
        values = torch.stack([part.diagnostics[name] for part in parts])
        assert value.item() == pytest.approx(float((values * sizes).sum() / sum(LENGTHS)), rel=1e-9)
    dx_BSH = torch.autograd.grad(_weighed(y_BSH, routed), x_BSH, retain_graph=True)[0]
    assert not dx_BSH.flatten(0, 1)[real.spread(torch.ones_like(real.places_T)) == 0].any()


@pytest.mark.parametrize("overrides", ROUTERS.values(), ids=ROUTERS.keys())
def test_losses_and_gradients_do_not_depend_on_the_amount_of_padding(overrides: list[str]) -> None:
    found = []
    for longest in (11, 13, 64):
        layer, real = _layer(overrides), _real(LENGTHS, longest)
        y_BSH, routed = layer(_input(longest), Randomness.of(0, 0, torch.arange(len(LENGTHS))), real)
        losses = [float(loss.value.detach()) for loss in routed.losses.values()]
        measured = [one.measure(routed).tolist() for one in DIAGNOSTICS.values()]
        found.append((losses, measured, _gradients(layer, _weighed(y_BSH, routed))))
    for losses, measured, gradients in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-9)
        for one, other in zip(measured, found[0][1], strict=True):
            assert one == pytest.approx(other, rel=1e-9)
        for one, other in zip(gradients, found[0][2], strict=True):
            assert torch.allclose(one, other, atol=1e-10)


@pytest.mark.parametrize("overrides", ROUTERS.values(), ids=ROUTERS.keys())
def test_where_all_tokens_are_real_nothing_changes(overrides: list[str]) -> None:
    layer, lengths = _layer(overrides), (13,) * len(LENGTHS)
    randomness = Randomness.of(0, 0, torch.arange(len(LENGTHS)))
    y_BSH, routed = layer(_input(13), randomness, _real(lengths, 13))
    same_BSH, same = layer(_input(13), randomness)
    assert torch.equal(y_BSH, same_BSH)
    assert torch.equal(routed.counts_E, same.counts_E)
    for name, loss in routed.losses.items():
        assert float(loss.value.detach()) == pytest.approx(float(same.losses[name].value.detach()), rel=1e-12)


@pytest.mark.parametrize("backend", [ExpertBackend.loop, ExpertBackend.grouped_mm])
@pytest.mark.parametrize("overrides", ROUTERS.values(), ids=ROUTERS.keys())
def test_padding_alone_gives_finite_losses_and_gradients_of_zero(overrides: list[str], backend: ExpertBackend) -> None:
    layer, real = _layer(overrides, backend), _real((0,) * len(LENGTHS), 13)
    x_BSH = _input(13).requires_grad_()
    y_BSH, routed = layer(x_BSH, Randomness.of(0, 0, torch.arange(len(LENGTHS))), real)
    assert not y_BSH.any()
    assert not routed.counts_E.any()
    for one in DIAGNOSTICS.values():
        assert one.measure(routed).isfinite().all()
    for value in (*routed.diagnostics.values(), *(loss.value for loss in routed.losses.values())):
        assert value.isfinite()
    named = [x_BSH, *layer.parameters()]
    for gradient in torch.autograd.grad(_weighed(y_BSH, routed), named):  # none is missing: ZeRO could not reduce it
        assert not gradient.any()
