"""Standard deviations of initial weights, and what they are for: the scale of each layer's output at step 0."""

from __future__ import annotations

import math

import pytest
import torch

from moe.config.compose import load_config
from moe.model.build import build_model
from moe.model.transformer import Transformer
from moe.sparse import Experts, Randomness

LAYERS, HIDDEN = 2, 64
SMALL = [
    "model=tiny", "model.vocab_size=512", "tokenizer.vocab_size=512", f"model.num_hidden_layers={LAYERS}",
    f"model.hidden_size={HIDDEN}",
]  # fmt: skip
DENSE = ["model.mlp=dense", "model.intermediate_size=512"]
SPARSE = {
    "2 of 8": [],
    "2 of 8, narrow": ["model.intermediate_size=32"],
    "8 of 32": ["router.num_experts=32", "router.top_k=8", "model.moe_intermediate_size=64"],
    "top-1": ["router=switch"],
    "capacity": ["router.capacity_factor=0.5"],
    "plain probabilities": ["router.norm_topk_prob=false"],
    "scaled": ["router.norm_topk_prob=false", "router.routed_scaling_factor=3"],
    "sigmoid": ["router=lossfree"],
    "groups": ["router=deepseek_v3"],
    "noisy": ["router=noisy_topk"],
    "expert choice": ["router=expert_choice"],
    "shared": ["model.n_shared_experts=1"],
    "two shared, top-1": ["model.n_shared_experts=2", "router.top_k=1", "router.norm_topk_prob=false"],
    "layers differ": ["router.layers={1: {norm_topk_prob: false}}"],
}


def built(initializer: str, *overrides: str) -> Transformer:
    config = load_config([*SMALL, f"model.initializer={initializer}", *overrides])
    return build_model(config, torch.device("cpu"))


def output_scales(model: Transformer) -> list[float]:
    """The root mean square of each layer's MLP output, in the first training step."""
    found: list[float] = []
    for block in model.model.layers:
        block.mlp.register_forward_hook(  # pyright: ignore[reportAttributeAccessIssue]
            lambda _, __, out: found.append((out[0] if isinstance(out, tuple) else out).square().mean().sqrt().item())
        )
    ids = torch.randint(512, (8, 64), generator=torch.Generator().manual_seed(0))
    model.train()
    with torch.no_grad():
        model(ids, labels_BS=ids, randomness=Randomness.of(0, 0, torch.arange(8)))
    return found


@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_layer_has_the_output_scale_of_a_dense_one(name: str) -> None:
    expected = output_scales(built("equal_output", *DENSE))
    assert output_scales(built("equal_output", *SPARSE[name])) == pytest.approx(expected, rel=0.08)


def test_without_it_the_scale_is_the_routers() -> None:
    (expected, *_) = output_scales(built("fan_in", *DENSE))
    (top_1, *_) = output_scales(built("fan_in", *SPARSE["top-1"]))
    assert top_1 < 0.5 * expected


def test_the_scale_of_an_mlp_is_that_of_attention_whatever_the_width_and_depth() -> None:
    """A variance of 1/(2 · layers) for each projection into the residual stream, times what SwiGLU leaves."""
    for layers, width in ((2, 64), (2, 1024), (8, 256)):
        model = built(
            "fan_in", "model.mlp=dense", f"model.intermediate_size={width}", f"model.num_hidden_layers={layers}"
        )
        for scale in output_scales(model):
            assert scale * math.sqrt(2 * layers) == pytest.approx(0.6, rel=0.1)


@pytest.mark.parametrize(
    ("initializer", "inner", "into_residual", "embedding"),
    [
        ("normal", 0.05, 0.05, 0.05),
        ("depth_scaled", 0.05, 0.05 / math.sqrt(2 * LAYERS), 0.05),
        ("fan_in", 1 / math.sqrt(HIDDEN), 1 / math.sqrt(256 * 2 * LAYERS), 1.0),
    ],
)
def test_standard_deviations_are_those_of_the_formula(
    initializer: str, inner: float, into_residual: float, embedding: float
) -> None:
    drawn = ["model.initializer_range=0.05"] if initializer in ("normal", "depth_scaled") else []
    model = built(initializer, *drawn, "model.intermediate_size=256")
    block = model.model.layers[0]
    experts = block.mlp.experts
    assert isinstance(experts, Experts)
    found = {
        model.model.embed_tokens.weight: embedding,
        model.lm_head.weight: inner,
        block.self_attn.q_proj.weight: inner,
        experts.gate_up_proj: inner,
        experts.down_proj: into_residual,
    }
    for weight, std in found.items():
        assert weight.std().item() == pytest.approx(std, rel=0.03)
        assert abs(weight.mean().item()) < 6 * std / math.sqrt(weight.numel())
    gate = block.mlp.gate.weight
    assert gate.std().item() == pytest.approx(inner, rel=0.2)


def test_a_tied_embedding_has_the_heads_scale() -> None:
    model = built("fan_in", "model.tie_word_embeddings=true")
    assert model.lm_head.weight.std().item() == pytest.approx(1 / math.sqrt(HIDDEN), rel=0.03)


def test_equal_output_scales_only_the_experts_and_keeps_the_draws() -> None:
    plain, equal = built("fan_in").state_dict(), built("equal_output").state_dict()
    for name, value in plain.items():
        if name.endswith("experts.down_proj"):
            ratio = equal[name] / value
            assert ratio.min().item() == pytest.approx(ratio.max().item(), rel=1e-5)
        else:
            assert torch.equal(equal[name], value), name
