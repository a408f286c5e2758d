"""What the layer stage counts as kept, and that its routing is the one that it says."""

from __future__ import annotations

import torch

from moe.bench.gpu import layer
from moe.bench.gpu.measure import kept_bytes
from moe.bench.gpu.models import one_layer
from moe.bench.routing import uniform_routing

CPU, TOKENS = torch.device("cpu"), 64


def test_a_storage_counts_once_and_weights_do_not() -> None:
    weight, x = (torch.randn(8, 8, requires_grad=True) for _ in range(2))
    size = 4 * 8 * 8
    assert kept_bytes(lambda: x @ weight, [weight]) == size  # for the weight's gradient
    assert kept_bytes(lambda: x @ x.t(), [weight]) == size
    assert kept_bytes(lambda: (x @ weight).exp(), [weight]) == 2 * size


def test_each_back_end_keeps_at_least_its_input_and_gate_up_and_grouped_mm_less_than_the_loop() -> None:
    kept, least = dict[str, float](), 0
    for backend in ("loop", "grouped_mm"):
        config = one_layer([f"experts.backend={backend}"], dry_run=True)
        found = layer._measure(layer._mlp(config, CPU).to(torch.bfloat16), config, TOKENS)
        kept[backend] = found["kept_GiB"] * 2**30
        rows = TOKENS * config.router.experts_per_token
        least = 2 * (TOKENS * config.model.hidden_size + 2 * rows * config.model.intermediate_size)
    assert least <= kept["grouped_mm"] < kept["loop"]


def test_own_routing_and_uniform_routing_are_told_apart() -> None:
    config = one_layer(["experts.backend=grouped_mm"], dry_run=True)
    mlp = layer._mlp(config, CPU).to(torch.bfloat16)
    assert layer._measure(mlp, config, TOKENS)["MaxVio"] > 0
    with uniform_routing(mlp):
        assert layer._measure(mlp, config, TOKENS)["MaxVio"] == 0
