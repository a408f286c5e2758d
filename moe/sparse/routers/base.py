"""What a sparse layer tells about its routing.

Shapes: T tokens, K choices per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class RouterOutput:
    """What a sparse layer's router did with one micro-batch; returned by every sparse layer, never parked in a global.

    Floats are float32 whatever the model's dtype (float64 in a float64 model). `counts_E` and the losses are those of
    this rank's tokens. `keep_TK` is None when dropless; a choice it marks False contributes zero to its token's output.
    """

    logits_TE: Tensor
    probs_TE: Tensor  # softmax over all experts
    ids_TK: Tensor  # int64, best first
    weights_TK: Tensor  # renormalised over the K chosen, dropped ones included
    counts_E: Tensor  # int64, choices per expert before any dropping
    dropped: Tensor  # int64 scalar, choices dropped by capacity
    load_balancing_loss: Tensor  # scalar, 1.0 = uniform
    z_loss: Tensor  # scalar
    keep_TK: Tensor | None = None  # bool
