"""Initial weights: a function of (seed, parameter name, global expert index) alone.

They are therefore the same for any number of ranks, any expert-parallel size and any device. Every parameter has its
own generator on the CPU, where its values are drawn in float32; several threads draw parameters in parallel.

`model.initializer` gives each matrix's standard deviation; norms are 1.

    normal        initializer_range everywhere (transformers' Mistral and Mixtral)
    depth_scaled  the same; projections into the residual stream divided by √(2 · layers) (GPT-2, §2.3)
    fan_in        1/√fan_in (LeCun 1998), embeddings 1 unless tied; projections into the residual stream divided by
                  √(2 · layers)
    equal_output  fan_in, where a sparse layer's output has the standard deviation of a dense MLP's, whatever the
                  router and the number and width of the experts

Legend: H hidden, F width of an expert, K choices a token, w their weights.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor, nn

from moe.config import Initializer, ModelConfig, RouterConfig
from moe.cores import usable_cpus
from moe.model.norm import RMSNorm
from moe.sparse import Experts, Randomness, SparseMLP, build_router

MAX_THREADS = 16  # each holds one parameter, or one expert's share of it, in float32 until it is copied
RESIDUAL = ("o_proj", "down_proj")  # names of the projections into the residual stream
SEQUENCES, POSITIONS = 8, 64  # of the random tokens that measure a router's weights


def fill_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Draws all parameters from normal distributions of mean 0, except norms, which are 1. A tied one is drawn once, by
    its first name."""
    with torch.no_grad(), ThreadPoolExecutor(_threads()) as pool:
        for _ in pool.map(_draw, *zip(*_draws(model, config, seed), strict=True)):
            pass


def _draws(model: nn.Module, config: ModelConfig, seed: int) -> Iterator[tuple[Tensor, float, int]]:
    """Yields (tensor to fill, its standard deviation, its seed); sets the norms itself."""
    seen: set[int] = set()
    sparse: dict[str, _SparseScale] = {}  # {name of a sparse layer: its scale}, for the modules inside it
    for prefix, module in model.named_modules():
        if isinstance(module, SparseMLP) and config.initializer is Initializer.equal_output:
            sparse[prefix] = _SparseScale(module, config)
        if isinstance(module, Experts):
            scale = sparse.get(prefix.rpartition(".")[0])
            for name, weight, one in module.draws(partial(expert_seed, seed, prefix)):
                std = _std(config, name, weight.shape[-1])
                if scale is not None and name in RESIDUAL:
                    std = scale.routed
                yield weight, std, one
            continue
        if isinstance(module, RMSNorm):
            module.reset_parameters()
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                lookup = isinstance(module, nn.Embedding) and not config.tie_word_embeddings
                inner = name.removesuffix(".weight").rpartition(".")[2]
                std = _std(config, inner, 1 if lookup else parameter.shape[-1])
                scale = sparse.get(prefix.rpartition(".shared_experts.")[0])
                if scale is not None and inner in RESIDUAL:
                    std = scale.shared
                yield parameter, std, seed_of(seed, name)


def _std(config: ModelConfig, name: str, fan_in: float) -> float:
    """Of the matrix `name` (the last part of its module's name)."""
    if config.initializer in (Initializer.normal, Initializer.depth_scaled):
        std = config.initializer_range
    else:
        std = 1 / math.sqrt(fan_in)
    into_residual = config.initializer is not Initializer.normal and name in RESIDUAL
    return std / math.sqrt(2 * config.num_hidden_layers) if into_residual else std


class _SparseScale:
    """Standard deviations of `down_proj` in a sparse layer under `equal_output`.

    A dense MLP of width W sums W products per output: variance W · std². The sparse layer's active width is
    W = K·F + shared_size. Of the dense MLP's variance the shared experts get their part of W, and the routed ones
    the rest: a token's K outputs come with weights w, so their variance F · std² · Σw² must be K·F/W.
    """

    def __init__(self, layer: SparseMLP, config: ModelConfig) -> None:
        choices, squares = _weights_of(config.hidden_size, layer.gate.config)
        width = layer.experts.down_proj.shape[-1]
        shared = layer.shared_experts is not None
        self.shared = _std(config, "down_proj", choices * width + (config.shared_size if shared else 0))
        self.routed = self.shared * math.sqrt(choices / squares)


def _weights_of(hidden_size: int, router: RouterConfig) -> tuple[float, float]:
    """(K, Σw²), means over random tokens of variance 1, of a router with random weights; in training's first step.

    Three digits are kept, so that devices whose sums round otherwise get the same weights.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        gate = build_router(hidden_size, router)
        for parameter in gate.parameters():
            parameter.normal_(0, 1 / math.sqrt(hidden_size), generator=generator)
        x_BSH = torch.randn(SEQUENCES, POSITIONS, hidden_size, generator=generator)
        choices = gate(x_BSH, Randomness.of(0, 0, torch.arange(SEQUENCES))).choices
    tokens = SEQUENCES * POSITIONS
    squares = choices.weights_N.double().square().sum().item() / tokens
    return round(choices.weights_N.numel() / tokens, 3), float(f"{squares:.2e}")


@torch.no_grad()  # a thread has a grad mode of its own
def _draw(tensor: Tensor, std: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    if tensor.device.type == "cpu" and tensor.dtype is torch.float32:
        tensor.normal_(0, std, generator=generator)
    else:
        tensor.copy_(torch.empty(tensor.shape).normal_(0, std, generator=generator))


def _threads() -> int:
    """This rank's share of the CPUs."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MAX_THREADS, max(1, usable_cpus() // ranks))


def seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little", signed=True)


def expert_seed(seed: int, prefix: str, name: str, expert: int) -> int:
    return seed_of(seed, f"{prefix}.{name}/{expert}")
