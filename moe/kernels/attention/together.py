"""Many short documents in one attention call: padded to the longest of those of about their length.

A document attends alone, so each would be a call of its own, and a batch of fine-tuning rows has hundreds. Documents of
at most LONGEST tokens are grouped by length, from over half of a power of two up to it: the padding is less than the
text. It is behind the text, where no token of a causal document sees it.

Legend: T tokens of the batch, documents end to end; P tokens with padding; N heads, D head dimension; C documents of a
group, L its longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.kernels.permute import permute_rows

LONGEST = 128  # tokens; a longer document has work enough for a call of its own


@dataclass(frozen=True, slots=True)
class Together:
    """Where the tokens of each group are: `shapes` are its (C, L), `take_P` the token at each padded place, `real_P`
    whether it is one (padding repeats its document's last), `back_T` the place of each token."""

    shapes: list[tuple[int, int]]
    take_P: Tensor
    real_P: Tensor
    back_T: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: Any) -> Together | None:
        """None where no two documents can share a call."""
        order = sorted(range(len(lengths)), key=lambda document: _group(lengths[document], document))
        groups = [[*group] for _, group in groupby(order, key=lambda document: _group(lengths[document], document))]
        if len(groups) == len(lengths):
            return None
        shapes = [(len(group), max(lengths[document] for document in group)) for group in groups]
        sizes_C = torch.tensor(lengths, device=device)
        starts_C = (sizes_C.cumsum(0) - sizes_C)[order]
        sizes_C = sizes_C[order]
        padded_C = torch.tensor([longest for count, longest in shapes for _ in range(count)], device=device)
        total = sum(count * longest for count, longest in shapes)
        document_P = torch.arange(len(lengths), device=device).repeat_interleave(padded_C, output_size=total)
        offset_P = torch.arange(total, device=device) - (padded_C.cumsum(0) - padded_C)[document_P]
        real_P = offset_P < sizes_C[document_P]
        take_P = starts_C[document_P] + torch.minimum(offset_P, sizes_C[document_P] - 1)
        places = real_P.nonzero().flatten()
        back_T = torch.empty_like(places).scatter_(0, take_P[places], places)
        return cls(shapes, take_P, real_P, back_T)

    def pad(self, x_TND: Tensor) -> list[Tensor]:
        """[C, L, N, D] of each group. What padding gets of a gradient is left out: nothing sees padding."""
        x_PND = permute_rows(x_TND, self.take_P, self.back_T)
        parts = x_PND.split([count * longest for count, longest in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def unpad(self, groups: Sequence[Tensor]) -> Tensor:
        """[T, N, D] from each group's [C, L, N, D]."""
        return _Unpad.apply(torch.cat([group.flatten(0, 1) for group in groups]), self)  # type: ignore[no-any-return]


def _group(length: int, document: int) -> tuple[int, int]:
    """Equal for documents that share a call."""
    return (0, (length - 1).bit_length()) if length <= LONGEST else (1, document)


class _Unpad(torch.autograd.Function):
    """The gather by `back_T`; its backward pass gathers too, and gives padding no gradient."""

    @staticmethod
    def forward(ctx: Any, x_PND: Tensor, places: Together) -> Tensor:
        ctx.places = places
        return x_PND.index_select(0, places.back_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TND: Tensor) -> tuple[Tensor, None]:
        places: Together = ctx.places
        return grad_TND.index_select(0, places.take_P) * places.real_P[:, None, None], None
