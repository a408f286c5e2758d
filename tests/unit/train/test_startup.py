"""The lines at a run's start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe.config import ExpertBackend
from moe.config.compose import load_config
from moe.kernels import expert_backends
from moe.kernels.expert_backends import BackendTimes, ExpertLoad, resolve_backend
from moe.train import startup


def test_a_rate_for_another_width_is_said() -> None:
    wider = load_config(["experiment=quickstart", "model.hidden_size=256"])
    assert startup._rate(wider) == [
        "learning rate: 0.004 = optim.lr 0.008 × optim.base_hidden_size 128 / model.hidden_size 256"
    ]
    assert startup._rate(load_config(["experiment=quickstart"])) == startup._rate(load_config([])) == []


def test_back_ends_are_timed_once_at_the_runs_own_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, which isn't here: what would be timed, and that all ranks' times decide."""
    sizes = ["train.micro_batch_size=4", "train.sequence_length=64", "train.global_batch_size=8", "router.top_k=2"]
    exchange = ["router.num_experts=8", "experts.exchange_chunks=2"]
    config = load_config(["model=tiny", "train.precision=bfloat16", *sizes, *exchange])
    device, model, loads = torch.device("cuda", 0), config.model, list[ExpertLoad]()
    times = {ExpertBackend.grouped_mm: 3.0, ExpertBackend.per_expert: 1.0}

    def measured(tried: object, load: ExpertLoad, *others: object) -> BackendTimes:
        loads.append(load)
        return BackendTimes(times, {})

    monkeypatch.setattr(expert_backends, "_routes", {})
    monkeypatch.setattr(startup, "candidates", lambda *asked: {})
    monkeypatch.setattr(startup, "measure", measured)
    slower = BackendTimes(times | {ExpertBackend.per_expert: 9.0}, {})
    mesh: Any = SimpleNamespace(
        device=device, expert_parallel_size=2, barrier=lambda: None, agree=lambda action, what: action(),
        gather=lambda mine: [mine, slower],
    )  # fmt: skip
    for _ in range(2):
        startup.time_experts(config, mesh)
    assert loads == [ExpertLoad(model.hidden_size, model.expert_size, 4, 4 * 64 * 2 // 2)]
    shapes = model.hidden_size, model.expert_size
    backend, reason = resolve_backend(config.experts, device, torch.bfloat16, shapes)
    assert backend is ExpertBackend.grouped_mm
    assert reason.startswith("grouped_mm 3 ms; per_expert 9 ms; forward and backward of 256 rows on 4 experts")
    mesh.device = torch.device("cpu")
    startup.time_experts(config, mesh)
    assert len(loads) == 1
