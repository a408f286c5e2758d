"""A run too large for this machine is refused, with the numbers; one that fits isn't."""

from __future__ import annotations

import time

import pytest
import torch

from moe.config import Config
from moe.config.compose import load_config
from moe.errors import UserError
from moe.plan import fit, plan_memory
from moe.plan.fit import MARGIN, check_model, check_run

CPU = torch.device("cpu")
SMALL = ["model=small", "train.sequence_length=1024", "train.micro_batch_size=64", "train.global_batch_size=64"]


def refusal(config: Config, world: int = 1, local: int = 1, device: torch.device = CPU) -> str:
    with pytest.raises(UserError) as caught:
        check_run(config, world, local, device)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_mixtral_on_this_machine_is_refused_in_milliseconds() -> None:
    config = load_config(["model=mixtral_8x22b", "model.num_hidden_layers=1000000"])
    started = time.monotonic()
    line = refusal(config)
    assert time.monotonic() - started < 5
    assert line.startswith("check_memory=true: this run needs about ")
    assert "TB of memory, phase checkpoint (the most for working, " in line
    assert "check_memory=false starts it anyway" in line
    check_run(load_config(["model=mixtral_8x22b", "check_memory=false"]), 1, 1, CPU)


@pytest.mark.parametrize("overrides", [SMALL, [*SMALL, "engine=plain"], [*SMALL, "train.precision=bfloat16"]])
def test_a_run_is_refused_above_the_margin_only(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(overrides)
    needed = plan_memory(config, 1).peak + fit.BATCH_BYTES * 64 * 1024
    for there, fits in ((needed, True), (needed / MARGIN + 1, True), (needed / MARGIN - 1, False)):
        monkeypatch.setattr(fit, "host_memory", lambda ranks=1, there=there: int(there))
        if fits:
            check_run(config, 1, 1, CPU)
        else:
            assert f"{fit.size(there)} are left" in refusal(config)


def test_advice_is_what_the_plan_tries_and_fits_when_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "host_memory", lambda ranks=1: 4 * 10**9)
    line = refusal(load_config(SMALL))
    advice = line.partition(": try ")[2].partition(" (needs ")[0].split(", ")
    assert advice[0].startswith("train.micro_batch_size="), line
    check_run(load_config([*SMALL, *advice]), 1, 1, CPU)


def test_each_rank_gets_its_share_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []
    monkeypatch.setattr(fit, "host_memory", lambda ranks=1: parts.append(ranks) or 16 * 10**9 // ranks)
    config = load_config([*SMALL, "train.global_batch_size=512"])
    line = refusal(config, world=8, local=8)
    assert parts == [8]
    assert "each rank needs about" in line
    assert "2 GB are left" in line


def test_a_step_whose_batches_are_too_many_is_refused() -> None:
    line = refusal(load_config(["train.global_batch_size=1000000000"]))
    assert "the most for batches, 5.12 TB" in line
    assert "try a smaller train.global_batch_size" in line


def test_a_gpu_is_asked_for_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    config = load_config(["model=mixtral_8x7b", "train.global_batch_size=64"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 10**9, 85 * 10**9))
    monkeypatch.setattr(fit, "host_memory", lambda ranks=1: 10**12)
    line = refusal(config, 8, 8, device)
    assert "of GPU memory, phase " in line
    assert "80 GB are left" in line
    assert "parallel.expert_parallel_size=8" in line
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**13, 10**13))
    check_run(config, 8, 8, device)
    monkeypatch.setattr(fit, "host_memory", lambda ranks=1: 10**9)
    assert "of host memory (the most for checkpoint, " in refusal(config, 8, 8, device)


def test_more_machines_are_advice_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * 10**9, 85 * 10**9))
    monkeypatch.setattr(fit, "host_memory", lambda ranks=1: 100 * 10**9)  # too little to offload the optimizer
    overrides = ["model=mixtral_8x7b", "train.global_batch_size=256", "train.micro_batch_size=1"]
    assert ", 2 such machines (needs " in refusal(load_config(overrides), 8, 8, torch.device("cuda", 0))


def test_a_model_is_refused_when_its_weights_alone_are_too_large() -> None:
    with pytest.raises(UserError, match=r"^check_memory=true: the model's weights take \d+ TB, and .* are left"):
        check_model(load_config(["model=mixtral_8x7b", "model.num_hidden_layers=1000000"]), CPU, torch.float32)
    check_model(load_config([]), CPU, torch.float32)
