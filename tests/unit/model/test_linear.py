"""No module bypasses another's forward pass to read its weight: a wrapped, hooked or replaced module takes effect, with
the gradients of a model with merged weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moe.config import ExpertsConfig, Mlp, ModelConfig, TopKRouterConfig
from moe.kernels import cross_entropy
from moe.model.cache import KVCache
from moe.model.linear import plain_weight
from moe.model.transformer import Transformer

VOCAB, RANK = 97, 3


def build(mlp: Mlp = Mlp.sparse, **settings: object) -> Transformer:
    config = ModelConfig(
        mlp=mlp, vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, **settings
    )
    model = Transformer(config, TopKRouterConfig(), ExpertsConfig())
    model.init_weights(0)
    return model.double()


def loss_of(model: Transformer) -> Tensor:
    ids = torch.randint(0, VOCAB, (2, 21), generator=torch.Generator().manual_seed(0))
    return model(ids, labels_BS=ids.roll(-1, 1)).lm_loss_sum


class LowRank(nn.Module):
    """y = base(x) + x Aᵀ Bᵀ, as an adapter adds it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.calls = base, 0
        generator = torch.Generator().manual_seed(1)
        self.a = nn.Parameter(torch.randn(RANK, base.in_features, generator=generator).double() * 0.1)
        self.b = nn.Parameter(torch.randn(base.out_features, RANK, generator=generator).double() * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.base(x) + x @ self.a.T @ self.b.T


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


LINEARS = {
    "model.layers.0.self_attn.q_proj": Mlp.sparse,
    "model.layers.1.self_attn.k_proj": Mlp.sparse,
    "model.layers.0.self_attn.v_proj": Mlp.sparse,
    "model.layers.0.self_attn.o_proj": Mlp.sparse,
    "model.layers.1.mlp.gate_proj": Mlp.dense,
    "model.layers.1.mlp.down_proj": Mlp.dense,
    "lm_head": Mlp.sparse,
}


@pytest.mark.parametrize(("name", "mlp"), LINEARS.items())
@pytest.mark.parametrize(
    "settings", [{}, {"recompute": "block"}, {"sliding_window": 5}], ids=["plain", "block", "window"]
)
def test_an_adapter_equals_merged_weights(name: str, mlp: Mlp, settings: dict[str, object], monkeypatch) -> None:

    monkeypatch.setitem(cross_entropy.SLICE_ELEMENTS, "cpu", 1)  # the head runs on the smallest slices
    wrapped = build(mlp, **settings)
    merged = copy.deepcopy(wrapped)
    adapter = LowRank(wrapped.get_submodule(name))
    with torch.no_grad():
        merged.get_submodule(name).weight += adapter.b @ adapter.a
    replace(wrapped, name, adapter)

    actual, expected, before = loss_of(wrapped), loss_of(merged), loss_of(build(mlp, **settings))
    assert adapter.calls > 0
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    assert (actual - before).abs() > 1e-6
    actual.backward()
    expected.backward()
    gradients = {key.replace(f"{name}.base.", f"{name}."): p.grad for key, p in wrapped.named_parameters()}
    for key, parameter in merged.named_parameters():
        torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-9, atol=1e-12, msg=key)
    whole = merged.get_submodule(name).weight.grad
    torch.testing.assert_close(adapter.b.grad, whole @ adapter.a.T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(adapter.a.grad, adapter.b.T @ whole, rtol=1e-9, atol=1e-12)


def test_an_adapter_acts_in_cached_generation() -> None:
    wrapped = build(sliding_window=4)
    for name in ("model.layers.0.self_attn.q_proj", "lm_head"):
        replace(wrapped, name, LowRank(wrapped.get_submodule(name)))
    ids = torch.arange(9)[None]
    cache = KVCache(wrapped.config, 1, 9, wrapped.device, wrapped.dtype)
    with torch.no_grad():
        expected = wrapped(ids).logits_BSV
        parts = [wrapped(ids[:, i : i + 1], cache=cache).logits_BSV for i in range(9)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-12)


class Added(nn.Module):
    """A parametrization: the weight with a constant added."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta


PARAMETRIZED = [
    ("model.layers.0.self_attn.q_proj", "weight"),
    ("model.layers.1.self_attn.o_proj", "weight"),
    ("lm_head", "weight"),
    ("model.embed_tokens", "weight"),
    ("model.layers.0.input_layernorm", "weight"),
    ("model.layers.0.mlp.gate", "weight"),
    ("model.layers.0.mlp.experts", "gate_up_proj"),
    ("model.layers.1.mlp.experts", "down_proj"),
]


@pytest.mark.parametrize(("name", "weight"), PARAMETRIZED)
def test_a_parametrization_equals_merged_weights(name: str, weight: str) -> None:
    model, merged = build(), build()
    target = getattr(merged.get_submodule(name), weight)
    delta = torch.randn(target.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 0.02
    with torch.no_grad():
        target += delta
    parametrize.register_parametrization(model.get_submodule(name), weight, Added(delta))
    actual, expected = loss_of(model), loss_of(merged)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    actual.backward()
    expected.backward()
    original = getattr(model.get_submodule(name).parametrizations, weight).original
    torch.testing.assert_close(original.grad, target.grad, rtol=1e-9, atol=1e-12)


class Counted(nn.Module):
    """A module that replaces the experts; only its forward pass is used."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.rows = base, 0

    def forward(self, x_NH: Tensor, counts_E: Tensor) -> Tensor:
        self.rows += len(x_NH)
        return 2 * self.base(x_NH, counts_E)


def test_replaced_experts_act() -> None:
    model, doubled = build(), build()
    for block, other in zip(model.model.layers, doubled.model.layers, strict=True):
        block.mlp.experts = Counted(block.mlp.experts)
        with torch.no_grad():
            other.mlp.experts.down_proj *= 2
    torch.testing.assert_close(loss_of(model), loss_of(doubled), rtol=1e-12, atol=0)
    assert [block.mlp.experts.rows for block in model.model.layers] == [2 * 21 * 2] * 2


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "lm_head"])
@pytest.mark.parametrize("way", ["hook", "forward", "bias"])
def test_what_is_not_a_plain_product_is_called(name: str, way: str) -> None:
    model, before = build(), loss_of(build())
    linear = model.get_submodule(name)
    assert plain_weight(linear) is linear.weight
    if way == "hook":
        linear.register_forward_hook(lambda module, args, out: out * 2)
    elif way == "forward":
        linear.forward = lambda x: x @ linear.weight.T * 2
    else:
        linear.bias = nn.Parameter(torch.linspace(0, 3, linear.out_features, dtype=torch.float64))
    assert plain_weight(linear) is None
    assert (loss_of(model) - before).abs() > 1e-6


def test_a_wrapped_tied_head_shares_the_embedding() -> None:
    model = build(tie_word_embeddings=True)
    replace(model, "lm_head", LowRank(model.lm_head))
    loss_of(model).backward()
    assert model.lm_head.base.weight is model.model.embed_tokens.weight
    assert model.lm_head.a.grad.abs().max() > 0
