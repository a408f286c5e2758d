"""Initial weights: a function of (seed, parameter name, global expert index) alone.

They are therefore the same for any number of ranks, any expert-parallel size and any device. Every parameter has its
own generator on the CPU, where its values are drawn in float32; several threads draw parameters in parallel.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor, nn

from moe.model.norm import RMSNorm
from moe.sparse import Experts

MAX_THREADS = 16  # each holds one parameter, or one expert's share of it, in float32 until it is copied


def fill_weights(model: nn.Module, std: float, seed: int) -> None:
    """Draws all parameters from N(0, std²), except norms, which are 1. A tied one is drawn once, by its first name."""
    with torch.no_grad(), ThreadPoolExecutor(_threads()) as pool:
        for _ in pool.map(partial(_draw, std), *zip(*_draws(model, seed), strict=True)):
            pass


def _draws(model: nn.Module, seed: int) -> Iterator[tuple[Tensor, int]]:
    """Yields (tensor to fill, its seed); sets the norms itself."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, Experts):
            yield from module.draws(partial(_expert_seed, seed, prefix))
            continue
        if isinstance(module, RMSNorm):
            module.reset_parameters()
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter, _seed(seed, name)


@torch.no_grad()  # a thread has a grad mode of its own
def _draw(std: float, tensor: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    if tensor.device.type == "cpu" and tensor.dtype is torch.float32:
        tensor.normal_(0, std, generator=generator)
    else:
        tensor.copy_(torch.empty(tensor.shape).normal_(0, std, generator=generator))


def _threads() -> int:
    """This rank's share of the CPUs."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MAX_THREADS, max(1, len(os.sched_getaffinity(0)) // ranks))


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little", signed=True)


def _expert_seed(seed: int, prefix: str, name: str, expert: int) -> int:
    return _seed(seed, f"{prefix}.{name}/{expert}")
