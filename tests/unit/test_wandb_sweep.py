"""configs/sweep/wandb: what `wandb agent` makes of it is a command of `moe train`, its metric one that is logged."""

from __future__ import annotations

import pytest
import yaml
from wandb.sdk.launch.sweeps import utils as sweep_utils

from moe.config.compose import load_config
from moe.config.presets import config_dir
from moe.train.panels import panels


def test_the_agents_command_composes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    sweep = yaml.safe_load((config_dir() / "sweep/wandb/router.yaml").read_text())
    chosen = {"router.aux_loss_coef": 0.0123, "router.z_loss_coef": 0.001}
    assert chosen.keys() == sweep["parameters"].keys()
    told = {"args": {key: {"value": value} for key, value in chosen.items()}}
    macros = {**sweep_utils.create_sweep_command_args(told), "env": ["/usr/bin/env"]}
    words = [word for part in sweep["command"] for word in macros.get(part.strip("${}"), [part])]
    assert words[:5] == ["/usr/bin/env", "python", "-m", "moe", "train"]
    config = load_config(words[5:])
    assert (config.router.aux_loss_coef, config.router.z_loss_coef) == (0.0123, 0.001)
    assert config.run_dir == "runs/wandb-abc123"
    assert sweep["metric"]["name"] in panels({"val_loss": 1.0}, layers=[], detailed=False)
