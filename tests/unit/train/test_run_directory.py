"""One model for its life; metrics go back to the checkpoint's step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe.config.compose import load_config, to_yaml
from moe.train import run_directory
from moe.train.tracking import cut_back

SAME = ("d1", "d1")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(to_yaml(load_config([])))
    return tmp_path


def test_another_model_cannot_continue_and_the_key_is_named(checkpoint: Path) -> None:
    for allowed in ("checkpoint.allow_changes=true", "checkpoint.allow_changes=false"):
        with pytest.raises(ValueError, match=r"model\.hidden_size=256, but the checkpoint .* model\.hidden_size=128"):
            run_directory.check_resumable(checkpoint, load_config(["model.hidden_size=256", allowed]), SAME)
        with pytest.raises(ValueError, match=r"router\.num_experts=4"):
            run_directory.check_resumable(checkpoint, load_config(["router.num_experts=4", allowed]), SAME)


@pytest.mark.parametrize("key", ["router.bias_update", "router.layers.1.bias_update"])
def test_a_bias_can_neither_come_nor_go(checkpoint: Path, key: str) -> None:
    changed = load_config([f"{key}=sign", "checkpoint.allow_changes=true"])
    with pytest.raises(ValueError, match=rf"{key}=sign, but the checkpoint .* {key}=(none|None)"):
        run_directory.check_resumable(checkpoint, changed, SAME)
    (checkpoint / "config.yaml").write_text(to_yaml(load_config(["router=lossfree"])))
    other = load_config(["router=lossfree", "router.bias_update=proportional", "checkpoint.allow_changes=true"])
    assert "router.bias_update: sign → proportional" in run_directory.check_resumable(checkpoint, other, SAME)


def test_what_changes_the_mathematics_needs_the_flag(checkpoint: Path) -> None:
    overrides = ["train.steps=500", "optim.lr=0.5", "checkpoint.every=7"]
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.001 → 0\.5; train\.steps: 300 → 500; .*allow_changes=true"):
        run_directory.check_resumable(checkpoint, load_config(overrides), SAME)
    lines = run_directory.check_resumable(checkpoint, load_config([*overrides, "checkpoint.allow_changes=true"]), SAME)
    assert set(lines) >= {"train.steps: 300 → 500", "optim.lr: 0.001 → 0.5", "checkpoint.every: 200 → 7"}
    with pytest.raises(ValueError, match=r"experts\.fp8: False → True; .*allow_changes=true"):
        run_directory.check_resumable(checkpoint, load_config(["experts.fp8=true"]), SAME)
    with pytest.raises(ValueError, match="the data's fingerprint: d1 → d2"):
        run_directory.check_resumable(checkpoint, load_config([]), ("d1", "d2"))


def test_what_computes_the_same_in_another_way_is_only_told(checkpoint: Path) -> None:
    overrides = [
        "parallel.zero_stage=2",
        "experts.backend=loop",
        "model.attention=naive",
        "model.initializer=fan_in",
        "train.log_every=1",
        "tracking=none",
        "check_memory=false",
    ]
    lines = run_directory.check_resumable(checkpoint, load_config(overrides), SAME)
    assert "parallel.zero_stage: 1 → 2" in lines
    assert "model.attention: auto → naive" in lines
    assert run_directory.check_resumable(checkpoint, load_config([]), SAME) == []


def test_a_longer_run_is_the_same_run_when_the_rate_depends_on_the_step_alone(tmp_path: Path) -> None:
    overrides = ["optim.schedule=constant", "optim.warmup_steps=10"]
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(overrides)))
    assert run_directory.check_resumable(tmp_path, load_config([*overrides, "train.steps=500"]), SAME) == [
        "train.steps: 300 → 500"
    ]


def test_the_same_rate_stated_for_another_width_is_only_told(checkpoint: Path) -> None:
    hidden = load_config([]).model.hidden_size
    same = [f"optim.base_hidden_size={hidden // 2}", "optim.lr=2e-3"]
    lines = run_directory.check_resumable(checkpoint, load_config(same), SAME)
    assert lines == [f"optim.base_hidden_size: None → {hidden // 2}", "optim.lr: 0.001 → 0.002"]
    with pytest.raises(ValueError, match=r"mathematics of the run: optim\.lr: 0\.001 → 0\.002"):
        run_directory.check_resumable(checkpoint, load_config(["optim.lr=2e-3"]), SAME)


def test_every_key_that_may_change_exists() -> None:
    whole = load_config(["adapter=lora", "init_from=unread", "adapter.rank_pattern={gate:4}", "optim.freeze=[x]"])
    keys = run_directory.flatten(whole)
    for prefix in (*run_directory.FIXED, *run_directory.NEUTRAL):
        assert any(key == prefix or key.startswith(f"{prefix}.") for key in keys), prefix


def test_metrics_are_cut_back_to_the_step_and_a_torn_line_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    cut_back(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    cut_back(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()
