"""Which parameters train, counted from the configuration, against the model itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from moe.adapters.attach import attach
from moe.config import Config
from moe.config.compose import load_config
from moe.engine.parameters import freeze
from moe.errors import UserError
from moe.model.build import empty_model
from moe.plan.counts import count_parameters
from moe.plan.memory import estimate_memory
from moe.plan.trained import parameter_shapes, trained_shapes

SMALL = [
    "tokenizer=mistral",
    "model.vocab_size=64",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
]
LORA = ["adapter=lora", "init_from=unread"]
CASES = [
    [],
    ["model.mlp=dense", "model.tie_word_embeddings=true"],
    ["model.n_shared_experts=1", "model.sparse_layers=every_2", "router=noisy_topk"],
    ["optim.freeze=[*embed*,*.experts.*]"],
    ["router=noisy_topk", "optim.freeze=[*.noise_weight]"],
    LORA,
    [*LORA, "adapter.target_modules=['*']", "adapter.rank_pattern={q_proj:3,experts:5}", "model.n_shared_experts=1"],
    [
        *LORA, "adapter.use_dora=true", "adapter.target_modules=[q_proj,gate]",
        "adapter.modules_to_save=[lm_head,*norm*]",
    ],
    [*LORA, "adapter.target_modules=['model.layers.1.*']", "optim.freeze=[*.lora.A]"],
]  # fmt: skip


def _model(config: Config) -> nn.Module:
    model = empty_model(config, torch.device("cpu"))
    if config.adapter.trains_adapter:
        attach(model, config.adapter, 0)
    freeze(model, config.optim)
    return model


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_names_and_shapes_are_the_models(overrides: list[str]) -> None:
    config = load_config([*SMALL, *overrides])
    model = _model(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    found = trained_shapes(config)
    assert found == expected
    assert sum(map(math.prod, parameter_shapes(config).values())) == count_parameters(config)[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*LORA, "adapter.target_modules=[up_proj]"], "adapter.target_modules=up_proj: no module of this model fits"),
        ([*LORA, "adapter.rank_pattern={down_proj:2}"], "adapter.rank_pattern.down_proj=2: no module of this model"),
        ([*LORA, "adapter.modules_to_save=[nope]"], "adapter.modules_to_save=nope: no parameter of this model fits"),
        ([*LORA, "adapter.modules_to_save=[k_proj]"], r"adapter.modules_to_save=k_proj: .* has an adapter, by "),
        (["optim.freeze=[nope]"], "optim.freeze=nope: no parameter of this model fits"),
        (["optim.freeze=['*']"], r"optim.freeze=\*: leaves nothing to train"),
    ],
    ids=str,
)
def test_a_plan_refuses_a_name_that_fits_nothing_as_the_run_does(overrides: list[str], message: str) -> None:
    config = load_config([*SMALL, *overrides])
    with pytest.raises(UserError, match=message) as planned:
        trained_shapes(config)
    with pytest.raises(UserError) as started:
        _model(config)
    # The examples of names come in an order of their own.
    assert str(planned.value).partition("like")[0] == str(started.value).partition("like")[0]


@pytest.mark.parametrize("override", ["experts.backend=megablocks", "experts.backend=triton", "experts.fp8=true"])
def test_experts_that_can_have_no_adapter(override: str) -> None:
    sizes = ["model.intermediate_size=64", "model.hidden_size=64"]
    with pytest.raises(UserError, match=f"{override} has no adapters on experts"):
        load_config([*SMALL, *LORA, *sizes, override])
    assert load_config([*SMALL, *LORA, *sizes, override, "adapter.target_modules=[q_proj]"])


def test_an_adapter_needs_little_more_than_the_weights() -> None:
    big = ["model=mixtral_8x7b", "tokenizer=mistral", "train.precision=bfloat16", "train.micro_batch_size=1"]
    whole, adapter = (
        estimate_memory(load_config([*big, "train.global_batch_size=8", *more]), 8, "cuda") for more in ([], LORA)
    )
    weights = count_parameters(load_config(big))[0]
    assert whole["weights"] == 2 * weights
    assert 2 * weights < adapter["weights"] < 2.05 * weights
    assert adapter["optimizer"] < whole["optimizer"] / 50
    assert adapter["gradients"] < whole["gradients"] / 50
