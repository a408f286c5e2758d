"""The lean decoder is held to the model's own forward pass, option by option, and to a number of operations a token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe.config import (
    ExpertsConfig,
    GroupLimitedRouterConfig,
    GumbelRouterConfig,
    Initializer,
    Mlp,
    ModelConfig,
    NoisyTopKRouterConfig,
    QkNorm,
    RouterConfig,
    TopKRouterConfig,
)  # fmt: skip
from moe.config.choices import BiasUpdate, ScoringFunction
from moe.inference.decoder import Decoder
from moe.inference.lean_decoder import LeanDecoder, obstacle, open_decoder
from moe.model.cache import KVCache
from moe.model.transformer import Transformer
from moe.sparse import routers_of
from tests.bias_router.router import BiasRouterConfig

ONE = [[5, 6, 7, 8, 9]]
THREE = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [7, 7, 7, 7]]
STEPS = 12


def build(router: RouterConfig | None = None, **settings: Any) -> Transformer:
    shape: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer": Initializer.normal,
        "initializer_range": 0.15,
    }
    model = Transformer(ModelConfig(**{**shape, **settings}), router or TopKRouterConfig(), ExpertsConfig())
    model.init_weights(0)
    for router_module in routers_of(model):
        for buffer in router_module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.linspace(-0.2, 0.2, buffer.numel()).view_as(buffer))
    return model.eval()


def cache_of(model: Transformer, batch: int, max_length: int) -> KVCache:
    return KVCache(model.config, batch, max_length, model.device, model.dtype)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "dense": {"mlp": Mlp.dense},
    "window": {"sliding_window": 6},
    "window of one": {"sliding_window": 1},
    "norm of heads": {"qk_norm": QkNorm.head},
    "norm of projections": {"qk_norm": QkNorm.projection},
    "scaled rotation": {"rope_scaling": YARN},
    "tied": {"tie_word_embeddings": True},
    "shared experts": {"n_shared_experts": 2, "moe_intermediate_size": 16},
    "some layers": {"sparse_layers": [1]},
    "one key head": {"num_key_value_heads": 1},
    "a head each": {"num_key_value_heads": 4, "head_dim": 6},
}
ROUTERS: dict[str, RouterConfig] = {
    "top-1": TopKRouterConfig(top_k=1, norm_topk_prob=False),
    "all experts": TopKRouterConfig(top_k=8),
    "sigmoid with a bias": TopKRouterConfig(
        scoring_func=ScoringFunction.sigmoid, bias_update=BiasUpdate.sign, routed_scaling_factor=2.5
    ),
    "capacity": TopKRouterConfig(capacity_factor=0.5),
    "jitter": TopKRouterConfig(jitter_noise=0.1),
    "group_limited": GroupLimitedRouterConfig(),
    "noisy_topk": NoisyTopKRouterConfig(),
    "gumbel": GumbelRouterConfig(temperature=0.7),
    "layers": TopKRouterConfig(layers={1: {"top_k": 3}}),
    "somebody's": BiasRouterConfig(),
}


def hold(model: Transformer, prompts: list[list[int]], chunk: int = 512, rtol: float = 1e-5) -> None:
    """Both decoders get the same tokens, the plain one's best; logits may differ by `rtol`."""
    assert obstacle(model) is None
    total = max(map(len, prompts)) + STEPS
    plain, lean = (kind(model, cache_of(model, len(prompts), total)) for kind in (Decoder, LeanDecoder))
    expected, got = (one.prefill(prompts, chunk, 0) for one in (plain, lean))
    tokens = set()
    for _ in range(STEPS):
        torch.testing.assert_close(got, expected, rtol=0, atol=rtol * max(1.0, float(expected.abs().max())))
        ids = expected.argmax(-1).tolist()
        tokens.update(ids)
        expected, got = plain.step(ids), lean.step(ids)
    assert len(tokens) > 1


@pytest.mark.parametrize("prompts", [ONE, THREE], ids=["one", "three"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_models(name: str, prompts: list[list[int]]) -> None:
    hold(build(**MODELS[name]), prompts)


@pytest.mark.parametrize("prompts", [ONE, THREE], ids=["one", "three"])
@pytest.mark.parametrize("name", ROUTERS)
def test_logits_with_every_router_that_is_causal(name: str, prompts: list[list[int]]) -> None:
    hold(build(ROUTERS[name]), prompts)


@pytest.mark.parametrize("window", [None, 6])
def test_prompts_in_chunks_and_float64(window: int | None) -> None:
    hold(build(sliding_window=window).double(), THREE, chunk=4, rtol=1e-12)


def test_a_context_beyond_the_rotary_table() -> None:
    hold(build(sliding_window=50), [list(range(40)) * 5])


def test_bfloat16_is_as_near_to_float32_as_the_model_is() -> None:
    exact, model = build(), build().bfloat16()
    kinds: list[tuple[type[Decoder], Transformer]] = [(Decoder, exact), (Decoder, model), (LeanDecoder, model)]
    runs = [kind(one, cache_of(one, 3, 20)) for kind, one in kinds]
    for run in runs:
        run.prefill(THREE, 512, 0)
    gaps = [0.0, 0.0]
    for _ in range(8):
        wanted, plain, lean = (run.step([1, 2, 3]).float() for run in runs)
        gaps = [max(gap, float((one - wanted).abs().max())) for gap, one in zip(gaps, (plain, lean), strict=True)]
    assert 0 < gaps[1] < 1.5 * gaps[0]


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("prompts", "most"), [(ONE, 42), (THREE, 65)], ids=["one", "three"])
def test_operations_a_layer(prompts: list[list[int]], most: int) -> None:
    """What a layer adds to a decoded token, never timings. The model's own pass takes 143 and 160."""
    counts = []
    for layers in (1, 3):
        model = build(num_hidden_layers=layers)
        decoder = open_decoder(model, cache_of(model, len(prompts), 40))
        decoder.prefill(prompts, 512, 0)
        with Operations() as operations:
            decoder.step([1] * len(prompts))
        counts.append(operations.count)
    assert (counts[1] - counts[0]) / 2 <= most
    assert counts[0] <= most + 55


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_what_it_does_not_know_goes_through_the_model() -> None:
    prompts, total = ONE, 20

    def same(model: Transformer, reason: str) -> None:
        assert obstacle(model) == reason
        decoder = open_decoder(model, cache_of(model, 1, total))
        decoder.prefill(prompts, 512, 0)
        whole = model(torch.tensor([[*prompts[0], 3]])).logits_BSV
        torch.testing.assert_close(decoder.step([3]), whole[:, -1], rtol=0, atol=1e-5)

    replaced = build()
    attention = replaced.model.layers[1].self_attn
    attention.o_proj = Doubled(32, 32, bias=False)
    same(replaced, "model.layers.1.self_attn.o_proj is a Doubled")
    hooked = build()
    hooked.model.layers[0].mlp.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))
    same(hooked, "model.layers.0.mlp has hooks or a forward pass of its own")
    biased = build()
    biased.lm_head = nn.Linear(32, 40)
    same(biased, "lm_head has a bias")
    with torch.autocast("cpu"):
        assert obstacle(build()) == "autocast is on"


def test_weights_are_those_of_now() -> None:
    """A sample while training: the decoder is opened anew, so no weight is stale."""
    model = build()
    LeanDecoder(model, cache_of(model, 1, 20)).prefill(ONE, 512, 0)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    hold(model, ONE)


def test_a_full_cache_takes_no_token() -> None:
    model = build()
    decoder = LeanDecoder(model, cache_of(model, 1, 6))
    with pytest.raises(ValueError, match="cache with 0 of max_length=6"):
        decoder.step([1])
    decoder.prefill(ONE, 512, 0)
    decoder.step([1])
    with pytest.raises(ValueError, match="cache with 6 of max_length=6 positions can't take one more"):
        decoder.step([1])
