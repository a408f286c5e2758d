"""Frozen parameters and buffers: no optimizer updates them, and a checkpoint has them beside the trained parameters,
but not those of an adapter's base (`moe.checkpoint.base`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def untrained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """{name: the model's own tensor} of the parameters that don't train and of the persistent buffers (those of its
    `state_dict`), in an order that all ranks share. Of frozen experts a rank has its slice; buffers are the same on
    all ranks. Those in `Transformer.base_names` are left out."""
    persistent, elsewhere = model.state_dict().keys(), getattr(model, "base_names", frozenset())
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad and name not in elsewhere}
    return frozen | {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def saved_dtype(tensor: Tensor) -> torch.dtype:
    """Float32 for weights, which an engine may hold in bfloat16; buffers' own."""
    return torch.float32 if isinstance(tensor, nn.Parameter) else tensor.dtype


def copied(tensors: dict[str, Tensor], keep: set[str]) -> dict[str, Tensor]:
    """Those in `keep`, as they are saved: copies in the host's memory."""
    return {
        name: tensor.detach().to("cpu", saved_dtype(tensor), copy=True).contiguous()
        for name, tensor in tensors.items()
        if name in keep
    }


def empty_parts(tensors: dict[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Zeros of the same shapes, as they are saved, for a reader to fill: part by part, each of one tensor or of at most
    `max_bytes`."""
    part: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if part and tensor.nbytes + sum(other.nbytes for other in part.values()) > max_bytes:
            yield part
            part = {}
        part[name] = torch.zeros(tensor.shape, dtype=saved_dtype(tensor))
    if part:
        yield part
