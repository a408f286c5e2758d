"""Keys that nothing reads are named, and only those."""

import re
from pathlib import Path

import pytest

from moe.config.compose import load_config
from moe.config.idle import idle_keys

LORA = ["adapter=lora", "init_from=there", "data.path=here"]


@pytest.mark.parametrize(
    ("stated", "line", "switched_on"),
    [
        (["router.bias_update_rate=0.01"], "router.bias_update_rate=0.01 .*none", ["router.bias_update=sign"]),
        (
            ["+router.schedules.bias_update_rate={0:0.1,9:0}"],
            r"router.schedules.bias_update_rate=\{0: 0.1, 9: 0.*none",
            ["router.layers={1:{bias_update:sign}}"],
        ),
        (["router.drop_policy=probability"], "drop_policy=probability .*null", ["router.capacity_factor=1.0"]),
        (["optim.min_lr_ratio=0", "optim.schedule=constant"], "min_lr_ratio=0.0 .*constant", ["optim.schedule=cosine"]),
        (["guard.spike_window=64"], "guard.spike_window=64 .*null", ["guard.spike_sigmas=6"]),
        (["train.answer_rows=9"], r"answer_rows=9 .*\[\]", ["data=sft", LORA[2], "train.answer_metrics=[exact_match]"]),
        (["tracking.report=true", "tracking=none"], "tracking.report=true .*none", ["tracking=wandb"]),
        (["parallel.expert_across_nodes=true"], "across_nodes=true .*=1", ["parallel.expert_parallel_size=2"]),
        (
            [*LORA, "adapter.target_modules=[experts]", "adapter.lora_dropout=0.1"],
            "adapter.lora_dropout=0.1 .*q_proj",
            ["adapter.target_modules=[experts,model.layers.1.self_attn.*]"],
        ),
    ],
)  # fmt: skip
def test_an_idle_key_is_named_until_it_is_switched_on(stated: list[str], line: str, switched_on: list[str]) -> None:
    (said,) = idle_keys(load_config(stated))
    assert re.search(line, said), said
    assert idle_keys(load_config([*stated, *switched_on])) == []


@pytest.mark.parametrize("group", ["router", "optim", "experiment", "model", "adapter"])
def test_presets_state_no_idle_key(group: str) -> None:
    presets = sorted((Path(__file__).parents[3] / "configs" / group).glob("*.yaml"))
    assert presets
    for preset in presets:
        more = LORA[1:] if group == "adapter" or preset.stem == "sft" else []
        assert idle_keys(load_config([f"{group}={preset.stem}", *more])) == [], preset
