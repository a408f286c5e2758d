"""torch's AdamW, for optimizers that are not compiled.

torch wraps some of its optimizers' methods so that `torch.compile` can leave them out. The wrappers import
torch._dynamo when they are called: over a second of every rank's start. Here the methods are the wrapped ones
themselves; what they compute is the same.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.optim import Optimizer


def _unwrapped(method: Any) -> Any:
    return inspect.unwrap(method)


class AdamW(torch.optim.AdamW):
    """Arguments, arithmetic and state of torch.optim.AdamW (arXiv 1711.05101)."""

    add_param_group = _unwrapped(Optimizer.add_param_group)
    zero_grad = _unwrapped(Optimizer.zero_grad)
    state_dict = _unwrapped(Optimizer.state_dict)
    load_state_dict = _unwrapped(Optimizer.load_state_dict)
    step = torch.no_grad()(_unwrapped(torch.optim.AdamW.step))
