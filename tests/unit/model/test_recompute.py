"""Recomputing activations uses less memory, and results are bitwise the same."""

from __future__ import annotations

import pytest
import torch

from moe.config.compose import load_config
from moe.model.transformer import Transformer
from moe.sparse.balance import balance_loss


def _run(overrides: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """(loss, gradients, bytes that autograd saves for the backward pass, without weights)."""
    small = ["model.vocab_size=300", "model.hidden_size=32", "model.intermediate_size=64", "tokenizer.vocab_size=300"]
    config = load_config([*small, "model.sliding_window=8", *overrides])
    model = Transformer(config.model, config.router, config.experts)
    model.init_weights(0)
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(ids, labels_BS=ids.roll(-1, 1))
        loss = output.lm_loss_sum
        if output.routers:
            loss = loss + balance_loss(output.routers)
        size = sum(kept.values())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, size


@pytest.mark.parametrize("more", [[], ["router.capacity_factor=1.0"], ["model.mlp=dense"]])
def test_bitwise_the_same_with_less_kept(more: list[str]) -> None:
    loss, gradients, whole = _run(more)
    sizes = [whole]
    for recompute in ("mlp", "block"):
        again, other, size = _run([*more, f"model.recompute={recompute}"])
        assert torch.equal(again, loss)
        assert other.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.equal(other[name], gradient), name
        sizes.append(size)
    assert sizes[0] > sizes[1] > sizes[2]
