"""The plan of the machine at hand uses its own GPU's bandwidth."""

from __future__ import annotations

import pytest
import torch

from moe.bench.gpu import hardware
from moe.bench.gpu.models import step_overrides

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "stated"), [("NVIDIA H200", 4800), ("NVIDIA H100 80GB HBM3", 3350)])
def test_a_known_gpu_has_its_data_sheets_bandwidth(monkeypatch: pytest.MonkeyPatch, name: str, stated: float) -> None:
    monkeypatch.setattr(hardware, "device_name", lambda device: name)
    moved, source = hardware.bandwidth(torch.device("cuda", 0))
    assert moved == stated
    assert source.startswith("stated, h")


def test_an_unknown_ones_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hardware.stated("NVIDIA H100 PCIe") is None  # whose memory is slower
    monkeypatch.setattr(hardware, "copy_bandwidth", lambda size, device: 2e12)
    assert hardware.bandwidth(CPU) == (2000, "measured, a copy")


def test_the_plan_takes_the_bandwidth() -> None:
    slow, fast = (hardware.plan_here(step_overrides(dry_run=True), CPU, 1e12, each) for each in (3350, 4800))
    assert slow.times.update == pytest.approx(fast.times.update * 4800 / 3350)
    assert slow.times.compute == fast.times.compute
