"""Routers at the command line: published presets train, and a run that is unbalanced or looks ahead says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe.config.compose import load_config
from tests.e2e.conftest import SMALL, Run, read_metrics

TINY = [*(one for one in SMALL if not one.startswith("router.")), "engine=plain", "train.steps=3", "train.eval_every=3"]


def _trained(moe: Run, corpus: list[str], folder: Path, *overrides: str) -> tuple[str, str, list[dict[str, object]]]:
    """(stdout, stderr, metrics) of a run of three steps."""
    done = moe("train", f"run_dir={folder}", *corpus, *TINY, *overrides)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr, read_metrics(folder)


@pytest.mark.parametrize(
    ("overrides", "logged", "not_logged"),
    [
        (
            [
                "router=deepseek_v3",
                "router.num_experts=16",
                "model.n_shared_experts=1",
                "model.moe_intermediate_size=16",
            ],
            "sequence_balancing_loss",
            "global_balancing_loss",
        ),
        (["router=lossfree"], "load_balancing_loss", "val_loss_leaky"),
        (["router=qwen3_moe", "router.num_experts=16"], "global_balancing_loss", "sequence_balancing_loss"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_published_routers_train(
    moe: Run, corpus: list[str], tmp_path: Path, overrides: list[str], logged: str, not_logged: str
) -> None:
    out, err, metrics = _trained(moe, corpus, tmp_path, *overrides)
    assert "unbalanced" not in err
    assert "validation loss" in out
    assert logged in metrics[-1]
    assert not_logged not in metrics[-1]


def test_the_whole_of_deepseek_v3s_router_composes() -> None:
    assert load_config(["router=deepseek_v3"]).router.num_experts == 256


def test_a_router_without_balance_trains_and_says_so(moe: Run, corpus: list[str], tmp_path: Path) -> None:
    none = ["router=topk", "router.aux_loss_coef=0", "router.z_loss_coef=0", "router.bias_update_rate=0.01"]
    _, err, metrics = _trained(moe, corpus, tmp_path, *none)
    assert "warning: router.bias_update_rate=0.01 has no effect with router.bias_update=none" in err
    assert "router.kind=topk: trains unbalanced" in err
    assert metrics[-1]["loss"] == pytest.approx(metrics[-1]["lm_loss"])
    assert metrics[-1]["load_balancing_loss"] > 0  # type: ignore[operator]


def test_expert_choice_says_that_it_looks_ahead_and_generates_no_text(
    moe: Run, corpus: list[str], tmp_path: Path
) -> None:
    _, err, metrics = _trained(moe, corpus, tmp_path, "router=expert_choice", "train.sample_every=1")
    assert "router.kind=expert_choice: in training a token's experts depend on later tokens" in err
    assert metrics[-1]["val_loss_leaky"] != metrics[-1]["val_loss"]
    assert "unserved_fraction" in metrics[-1]
    assert not (tmp_path / "samples.jsonl").exists()
    text = moe("generate", f"checkpoint={tmp_path}", "prompt=3 plus 4", "max_new_tokens=2")
    assert text.returncode == 2
    assert "router.kind=expert_choice" in text.stderr
    assert "Traceback" not in text.stderr
