"""Router presets and options: published numbers, rules, schedules, settings per layer, the saved file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe.config import BiasUpdate, DropPolicy, ExpertChoiceRouterConfig, ScoringFunction, TopKRouterConfig
from moe.config.compose import ConfigError, load_config, read_config, to_yaml
from moe.config.presets import choices, config_dir
from moe.config.router import kinds_with

SHIPPED = sorted(path.stem for path in (config_dir() / "router").glob("*.yaml"))
SIGMOID = ScoringFunction.sigmoid
PUBLISHED: dict[str, dict[str, object]] = {
    "mixtral": {"num_experts": 8, "top_k": 2, "norm_topk_prob": True, "aux_loss_coef": 0.02, "z_loss_coef": 0.0},
    "lossfree": {
        "num_experts": 8, "top_k": 2, "scoring_func": SIGMOID, "aux_loss_coef": 0.0, "z_loss_coef": 0.0,
        "bias_update": BiasUpdate.sign, "bias_update_rate": 0.001,
    },
    "switch": {
        "top_k": 1, "norm_topk_prob": False, "aux_loss_coef": 0.01, "z_loss_coef": 0.0, "jitter_noise": 0.01,
        "capacity_factor": 1.25, "drop_policy": DropPolicy.position,
    },
    "gshard": {"top_k": 2, "norm_topk_prob": True, "capacity_factor": 1.0, "drop_policy": DropPolicy.position},
    "st_moe": {"top_k": 2, "aux_loss_coef": 0.01, "z_loss_coef": 0.001, "capacity_factor": 1.25},
    "deepseek_v3": {
        "kind": "group_limited", "num_experts": 256, "top_k": 8, "n_group": 8, "topk_group": 4, "scoring_func": SIGMOID,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "sequence_aux_loss_coef": 1e-4, "aux_loss_coef": 0.0,
        "bias_update": BiasUpdate.sign, "bias_update_rate": 0.001, "capacity_factor": None,
    },
    "olmoe": {
        "num_experts": 64, "top_k": 8, "norm_topk_prob": False, "aux_loss_coef": 0.01, "z_loss_coef": 0.001,
        "capacity_factor": None,
    },
    "qwen3_moe": {
        "num_experts": 128, "top_k": 8, "norm_topk_prob": True, "aux_loss_coef": 0.0, "global_aux_loss_coef": 0.001,
    },
    "expert_choice": {"kind": "expert_choice", "capacity_factor": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("preset", SHIPPED)
def test_every_preset_composes_for_train_and_is_saved(preset: str, tmp_path: Path) -> None:
    assert preset in choices("router")
    config, path = load_config([f"router={preset}"]), tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert read_config(path) == config


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_numbers(preset: str) -> None:
    router = load_config([f"router={preset}"]).router
    assert {name: getattr(router, name) for name in PUBLISHED[preset]} == PUBLISHED[preset]


@pytest.mark.parametrize("preset", SHIPPED)
def test_a_preset_repeats_no_default(preset: str) -> None:
    import yaml

    stated = yaml.safe_load((config_dir() / "router" / f"{preset}.yaml").read_text())
    (schema,) = stated.pop("defaults")
    router = load_config([f"router={preset}"]).router
    assert schema == f"{router.kind}_schema"
    default = type(router)()
    for name in stated:
        assert getattr(router, name) != getattr(default, name), name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "router.top_k=1",
            "router.top_k=1 with router.norm_topk_prob=true gives every token the weight 1, so the language-model loss "
            "trains no router: set router.norm_topk_prob=false",
        ),
        ("router.schedules.top_k={0:2,9:1}", "router.schedules.top_k: router.top_k=1 with router.norm_topk_prob=true"),
        ("router.layers.1.top_k=1", "router.layers.1: router.top_k=1 with router.norm_topk_prob=true"),
        ("router=group_limited router.n_group=3", "router.n_group=3 must divide router.num_experts=8"),
        ("router=group_limited router.n_group=8", "router.n_group=8 must be ≤ router.num_experts / 2 = 4"),
        ("router=group_limited router.topk_group=5", "router.topk_group=5 must be ≤ router.n_group=4"),
        ("router=group_limited router.topk_group=1 router.top_k=3", "router.top_k=3 must be ≤ the 2 experts of router"),
        ("router=expert_choice router.capacity_factor=9", "router.capacity_factor=9.0 must be ≤ router.num_experts=8"),
        ("router=gumbel router.temperature=0", "router.temperature=0.0 must be > 0"),
        ("router=noisy_topk router.noise_std=-1", "router.noise_std=-1.0 must be ≥ 0"),
        ("router.jitter_noise=1.5", "router.jitter_noise=1.5 must be"),
        ("router.routed_scaling_factor=0", "router.routed_scaling_factor=0.0 must be > 0"),
        ("router.scoring_func=tanh", "router.scoring_func=tanh must be one of softmax, sigmoid"),
        ("router.bias_update=both", "router.bias_update=both must be one of none, sign, proportional"),
        ("router.freeze_first_steps=-1", "router.freeze_first_steps=-1 must be ≥ 0"),
        ("router.schedules.jitter_noise={0:1}", "router.schedules.jitter_noise: topk routers can schedule top_k, "),
        ("router.schedules.temperature={0:1}", "router.schedules.temperature: topk routers can schedule top_k, "),
        (
            "router=expert_choice router.schedules.capacity_factor={0:1}",
            "expert_choice routers can schedule z_loss_coef",
        ),
        ("router.schedules.aux_loss_coef={}", "router.schedules.aux_loss_coef={} must be values by step"),
        ("router.schedules.aux_loss_coef=0.1", "router.schedules.aux_loss_coef=0.1 must be values by step, as in rou"),
        ("router.schedules.aux_loss_coef={0:-1}", "router.schedules.aux_loss_coef: router.aux_loss_coef=-1.0 must be"),
        ("router.schedules.aux_loss_coef={a:1}", "router.schedules.aux_loss_coef.a: must be a number, counted from 0"),
        ("router.schedules.aux_loss_coef={0:x}", "router.schedules.aux_loss_coef.0=x must be a number"),
        ("router.schedules.top_k={0:2.5}", "router.schedules.top_k.0=2.5 must be a whole number"),
        ("router.schedules.top_k={0:99}", "router.schedules.top_k: router.top_k=99 must be ≤ router.num_experts=8"),
        ("router.layers.first.top_k=3", "router.layers.first: must be a number, counted from 0"),
        ("router.layers.1.num_experts=3", "router.layers.1.num_experts: a layer of its own can have top_k, "),
        ("router.layers.1.topk=3", "router.layers.1.topk: a layer of its own can have top_k, "),
        ("router.layers.1=3", "router.layers.1=3 must be a mapping of options"),
        ("router.layers.1.top_k=99", "router.layers.1: router.top_k=99 must be ≤ router.num_experts=8"),
        ("router.layers.1.top_k=many", "router.layers.1: "),
        ("router.layers.99.top_k=3", "router.layers.99: layers with a router are 0, 1, 2, 3"),
        ("model.sparse_layers=[1] router.layers.0.top_k=3", "router.layers.0: layers with a router are 1"),
        ("model.sparse_layers=every_99", "model.sparse_layers=every_99 must be ≤ every_"),
        ("model.sparse_layers=[0,0]", "model.sparse_layers=[0, 0] must name layers from 0 to "),
        ("model.sparse_layers=some", "model.sparse_layers=some must be all, every_N as in every_2, or a list"),
        ("model.n_shared_experts=-1", "model.n_shared_experts=-1 must be ≥ 0"),
        ("model.moe_intermediate_size=0", "model.moe_intermediate_size=0 must be > 0"),
        ("optim.router_lr_multiplier=0", "optim.router_lr_multiplier=0.0 must be > 0"),
    ],
)
def test_a_wrong_option_is_one_line_with_key_and_rule(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_kinds_with_an_option() -> None:
    assert {"topk", "gumbel", "noisy_topk", "group_limited"} <= set(kinds_with("top_k"))
    assert kinds_with("temperature") == ["gumbel"]
    assert kinds_with("nothing") == []


def test_top_1_with_plain_scores_or_one_expert_is_allowed() -> None:
    assert load_config(["router.top_k=1", "router.norm_topk_prob=false"]).router.top_k == 1
    assert load_config(["router.num_experts=1", "router.top_k=1"]).router.num_experts == 1


def test_schedules_are_linear_between_their_points_and_whole_numbers_hold() -> None:
    router = load_config(
        ["router.schedules.aux_loss_coef={0:0.1,100:0.01}", "router.schedules.top_k={0:4,50:2}"]
    ).router
    assert [router.at("aux_loss_coef", step) for step in (0, 50, 100, 1000)] == pytest.approx([0.1, 0.055, 0.01, 0.01])
    assert [router.at("top_k", step) for step in (0, 49, 50, 99)] == [4, 4, 2, 2]
    assert router.at("z_loss_coef", 7) == 0.001
    assert (router.highest("aux_loss_coef"), router.highest("top_k"), router.experts_per_token) == (0.1, 4, 4)
    late = TopKRouterConfig(schedules={"aux_loss_coef": {10: 0.5, 20: 0.0}})
    assert [late.at("aux_loss_coef", step) for step in (0, 10, 15, 20)] == [0.5, 0.5, 0.25, 0.0]


def test_a_layer_has_its_own_options_and_the_others_schedules() -> None:
    router = load_config(
        [
            "router.layers.1.top_k=3", "router.layers.1.scoring_func=sigmoid", "router.aux_loss_coef=0.5",
            "router.schedules.aux_loss_coef={0:0.1,100:0.01}", "router.layers.2={aux_loss_coef:0.7}",
            "model.num_hidden_layers=3",
        ]
    ).router  # fmt: skip
    first, second, third = (router.for_layer(layer) for layer in range(3))
    assert (first.top_k, first.scoring_func, first.at("aux_loss_coef", 0)) == (2, ScoringFunction.softmax, 0.1)
    assert (second.top_k, second.scoring_func, second.at("aux_loss_coef", 100)) == (3, SIGMOID, 0.01)
    assert (third.top_k, third.at("aux_loss_coef", 100)) == (2, 0.7)
    assert router.choices_in([0, 1, 2]) == 7
    assert router.most_choices_in([0, 1]) == 3
    assert router.most_choices_in([0]) == 2


@pytest.mark.parametrize(
    "overrides",
    [
        "router.schedules.aux_loss_coef={0:0.1,100:0.01} router.layers.1.top_k=3 router.layers.0.bias_update=sign",
        "router=gumbel router.schedules.temperature={0:2.0,10000:0.5} router.freeze_last_steps=4",
        "router=deepseek_v3 router.num_experts=16 router.schedules.bias_update_rate={0:0.001,90:0.001,91:0}",
        "model.sparse_layers=[1,0] model.n_shared_experts=2 model.moe_intermediate_size=24",
        "model.sparse_layers=every_2 optim.router_lr_multiplier=0.5",
    ],
)
def test_a_saved_file_is_read_as_the_same(overrides: str, tmp_path: Path) -> None:
    config, path = load_config(overrides.split()), tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    again = read_config(path)
    assert again == config
    assert to_yaml(again) == to_yaml(config)


@pytest.mark.parametrize(
    ("options", "keeps"),
    [
        ({}, True),
        ({"aux_loss_coef": 0.0}, False),
        ({"aux_loss_coef": 0.0, "z_loss_coef": 1.0}, False),
        ({"aux_loss_coef": 0.0, "bias_update": BiasUpdate.sign}, True),
        ({"aux_loss_coef": 0.0, "variance_loss_coef": 0.1}, True),
        ({"aux_loss_coef": 0.0, "global_aux_loss_coef": 0.1}, True),
        ({"aux_loss_coef": 0.0, "sequence_aux_loss_coef": 0.1}, True),
        ({"aux_loss_coef": 0.0, "schedules": {"aux_loss_coef": {0: 0.0, 5: 0.1}}}, True),
    ],
)
def test_what_keeps_balance(options: dict[str, Any], keeps: bool) -> None:
    assert TopKRouterConfig(**options).keeps_balance is keeps


def test_expert_choice_is_not_causal_and_counts_its_average() -> None:
    assert not ExpertChoiceRouterConfig().is_causal
    assert TopKRouterConfig().is_causal
    assert ExpertChoiceRouterConfig(capacity_factor=1.0).experts_per_token == 1


def test_freezing_at_both_ends() -> None:
    router = TopKRouterConfig(freeze_first_steps=2, freeze_last_steps=3)
    assert [router.frozen(step, 10) for step in range(10)] == [True] * 2 + [False] * 5 + [True] * 3
    assert router.freezes
    assert not TopKRouterConfig().freezes
