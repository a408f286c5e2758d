"""LoRA: grouped products against a loop and float64, merging, DoRA, what trains, and peft on the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.adapters.attach import attach, reset_magnitudes
from moe.adapters.merge import is_part, merged
from moe.config import AdapterConfig, AdapterKind, ExpertBackend, ExpertsConfig, ModelConfig, TopKRouterConfig
from moe.errors import UserError
from moe.kernels.grouped_lora import LowRankPair, lora_ffn
from moe.kernels.grouped_swiglu import loop_ffn
from moe.model.transformer import Transformer

COUNTS = [3, 0, 5, 1]


def _model(**more: Any) -> Transformer:
    config = ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64, num_attention_heads=4, **more
    )
    model = Transformer(config, TopKRouterConfig(num_experts=4), ExpertsConfig())
    model.init_weights(0)
    return model


def _config(**more: Any) -> AdapterConfig:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "experts"]
    return AdapterConfig(kind=AdapterKind.lora, **{"r": 3, "target_modules": names} | more)


def _trained(model: Transformer, config: AdapterConfig) -> Transformer:
    """A copy with adapters that have moved."""
    model = copy.deepcopy(model)
    attach(model, config, 0)
    reset_magnitudes(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora.B"):
                parameter.normal_(0, 0.05, generator=generator)
            if name.endswith("magnitude"):
                parameter.mul_(1.1)
    return model


def _merged(model: Transformer, tuned: Transformer, config: AdapterConfig) -> Transformer:
    parts = {name: parameter.detach() for name, parameter in tuned.named_parameters() if is_part(name)}
    whole = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.copy_(merged(name, parameter, parts, parts.__getitem__, config))
    return whole


def _pairs(dtype: torch.dtype, *, rank: int = 8) -> tuple[Tensor, Tensor, Tensor, LowRankPair, LowRankPair]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) / 4).to(dtype)

    x_NH, w1, w2 = draw(sum(COUNTS), 8), draw(4, 2 * 12, 8), draw(4, 8, 12)
    first = LowRankPair(draw(4, rank, 8).requires_grad_(), draw(4, 24, rank).requires_grad_(), 0.5)
    second = LowRankPair(draw(4, rank, 12).requires_grad_(), draw(4, 8, rank).requires_grad_(), 0.5)
    return x_NH.requires_grad_(), w1, w2, first, second


@pytest.mark.parametrize("loop", [True, False])
def test_experts_equal_the_loop_over_merged_weights(loop: bool) -> None:
    x_NH, w1, w2, first, second = _pairs(torch.float32)
    y_NH = lora_ffn(x_NH, torch.tensor(COUNTS), w1, w2, first, second, loop=loop)
    whole = [w + pair.scale * pair.b_EOR @ pair.a_ERI for w, pair in ((w1, first), (w2, second))]
    expected_NH = loop_ffn(x_NH, COUNTS, whole[0], whole[1])
    torch.testing.assert_close(y_NH, expected_NH, rtol=1e-5, atol=1e-6)
    inputs = [x_NH, first.a_ERI, first.b_EOR, second.a_ERI, second.b_EOR]
    weight_NH = torch.linspace(-1, 1, y_NH.numel()).view_as(y_NH)
    found, expected = (torch.autograd.grad((y * weight_NH).sum(), inputs) for y in (y_NH, expected_NH))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_gradients_in_float64() -> None:
    x_NH, w1, w2, first, second = _pairs(torch.float64, rank=2)

    def run(*tensors: Tensor) -> Tensor:
        x, *rest = tensors
        pairs = LowRankPair(rest[0], rest[1], 0.5), LowRankPair(rest[2], rest[3], 0.5)
        return lora_ffn(x, torch.tensor(COUNTS), w1, w2, *pairs)

    assert torch.autograd.gradcheck(run, (x_NH, first.a_ERI, first.b_EOR, second.a_ERI, second.b_EOR))


def test_no_rows_leave_the_graph_connected() -> None:
    x_NH, w1, w2, first, second = _pairs(torch.float32)
    y_NH = lora_ffn(x_NH[:0], torch.zeros(4, dtype=torch.int64), w1, w2, first, second)
    y_NH.sum().backward()
    assert y_NH.shape == (0, 8)
    assert first.a_ERI.grad is not None
    assert first.a_ERI.grad.count_nonzero() == 0


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"experts": 5, "model.layers.0.*.q_proj": 1}}],
    ids=["lora", "rslora", "dora", "ranks"],
)
@pytest.mark.parametrize("backend", [ExpertBackend.auto, ExpertBackend.loop])
def test_merging_changes_nothing_and_new_adapters_neither(options: dict[str, Any], backend: ExpertBackend) -> None:
    model, config, ids = _model(), _config(**options), torch.arange(48).view(2, 24)
    for block in model.model.layers:
        block.mlp.experts.config = ExpertsConfig(backend=backend)  # type: ignore[union-attr]
    before = model(ids).logits_BSV
    fresh = copy.deepcopy(model)
    attach(fresh, config, 0)
    reset_magnitudes(fresh)
    torch.testing.assert_close(fresh(ids).logits_BSV, before, rtol=1e-5, atol=1e-6)
    tuned = _trained(model, config)
    logits = tuned(ids).logits_BSV
    assert (logits - before).abs().max() > 0.01
    assert (_merged(model, tuned, config)(ids).logits_BSV - logits).abs().max() <= 1e-5 * logits.abs().max()


def test_what_trains() -> None:
    model = _model()
    attach(model, _config(target_modules=["model.layers.1.*_proj"], modules_to_save=["lm_head", "*norm*"]), 0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if is_part(name)} == {
        f"model.layers.1.self_attn.{one}_proj.lora.{part}" for one in "qkvo" for part in "AB"
    }
    rest = {name for name in trained if not is_part(name)}
    assert rest == {name for name, _ in model.named_parameters() if "norm" in name} | {"lm_head.weight"}
    assert model.base_names.isdisjoint(trained)
    assert model.base_names | trained == {name for name, _ in model.named_parameters()}
    assert all(router.frozen for router in (block.mlp.gate for block in model.model.layers))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("saved", "weight", "target"),
    [
        ("o_proj", "self_attn.o_proj.weight", "o_proj"),
        ("*.gate.weight", "mlp.gate.weight", "gate"),
        ("experts", "mlp.experts.gate_up_proj", "experts"),
    ],
)
def test_a_weight_with_an_adapter_does_not_train_in_full_too(saved: str, weight: str, target: str) -> None:
    with pytest.raises(UserError) as caught:
        attach(_model(), _config(modules_to_save=["lm_head", saved], use_dora=True), 0)
    assert str(caught.value) == (
        f"adapter.modules_to_save={saved}: model.layers.0.{weight} has an adapter, by "
        f"adapter.target_modules={target}: leave it out of one of the two"
    )


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    def values(seed: int) -> dict[str, Tensor]:
        model = _model()
        attach(model, _config(), seed)
        return {name: parameter for name, parameter in model.named_parameters() if name.endswith(".A")}

    one, again, other = values(0), values(0), values(1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    first, second = one["model.layers.0.mlp.experts.gate_up_proj_lora.A"][:2]
    assert not torch.equal(first, second)
    assert float(first.detach().abs().max()) <= 32**-0.5


def test_a_merge_of_other_shapes_is_refused() -> None:
    parts = {"x.lora.A": torch.zeros(2, 5), "x.lora.B": torch.zeros(4, 2)}
    with pytest.raises(UserError, match=r"x\.lora: A \[2, 5\] and B \[4, 2\] don't fit x\.weight, \[4, 6\]"):
        merged("x.weight", torch.zeros(4, 6), parts, parts.__getitem__, _config())


def test_a_wrapped_projection_takes_part() -> None:
    """The joined query, key and value product is left out once one of the three is adapted."""
    model = _model()
    attach(model, _config(target_modules=["v_proj"]), 0)
    assert isinstance(model.model.layers[0].self_attn.v_proj, nn.Linear)
    before = model(torch.arange(8)[None]).logits_BSV
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.v_proj.lora.B").fill_(0.1)
    assert not torch.equal(model(torch.arange(8)[None]).logits_BSV, before)
