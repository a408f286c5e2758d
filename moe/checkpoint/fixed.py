"""What a model holds that no optimizer updates, and a checkpoint has beside the trained parameters: its buffers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def fixed_tensors(model: nn.Module) -> dict[str, Tensor]:
    """{name: the model's own tensor} of the persistent buffers (those of its `state_dict`), in an order that all ranks
    share. Buffers are the same on all ranks."""
    persistent = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def copied(tensors: dict[str, Tensor], keep: set[str]) -> dict[str, Tensor]:
    """Those in `keep`, as copies in the host's memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items() if name in keep}


def empty_parts(tensors: dict[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Host tensors for a reader to fill, of the same shapes: part by part, each of one tensor or of at most
    `max_bytes`."""
    part: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if part and tensor.nbytes + sum(other.nbytes for other in part.values()) > max_bytes:
            yield part
            part = {}
        part[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
    if part:
        yield part
