"""The optimizer is torch's, and nothing of torch's compiler is loaded for it."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from moe.engine.adamw import AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_steps_as_torchs_to_the_bit(dtype: torch.dtype) -> None:
    trained = []
    for kind in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
        groups = [
            {"params": list(model[0].parameters()), "lr": 3e-2, "weight_decay": 0.1, "name": "first"},
            {"params": list(model[2].parameters()), "weight_decay": 0.0, "name": "second"},
        ]
        optimizer = kind(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(32, 8, dtype=dtype)).square().mean().backward()
            optimizer.step()
        restored = kind(groups, lr=1.0, fused=True)
        restored.load_state_dict(optimizer.state_dict())
        model(torch.randn(32, 8, dtype=dtype)).square().mean().backward()
        restored.step()
        trained.append([*model.parameters(), *(state["exp_avg_sq"] for state in restored.state.values())])
    assert len(trained[0]) == 8
    assert all(torch.equal(mine, torchs) for mine, torchs in zip(*trained, strict=True))


def test_weights_that_need_gradients_are_updated_outside_of_autograd() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    AdamW([weight], lr=0.1).step()
    assert weight.is_leaf
    assert weight.requires_grad


SCRIPT = """
import sys, torch
from moe.engine.adamw import AdamW
weight = torch.nn.Parameter(torch.ones(3))
weight.grad = torch.ones(3)
optimizer = AdamW([weight], lr=0.1, fused=True)
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
"""


def test_torchs_compiler_is_not_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.strip() == "False"
