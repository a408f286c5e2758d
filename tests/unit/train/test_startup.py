"""The lines at a run's start."""

from __future__ import annotations

from moe.config.compose import load_config
from moe.train import startup


def test_a_rate_for_another_width_is_said() -> None:
    wider = load_config(["experiment=quickstart", "model.hidden_size=256"])
    assert startup._rate(wider) == [
        "learning rate: 0.004 = optim.lr 0.008 × optim.base_hidden_size 128 / model.hidden_size 256"
    ]
    assert startup._rate(load_config(["experiment=quickstart"])) == startup._rate(load_config([])) == []
