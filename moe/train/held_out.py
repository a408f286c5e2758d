"""What an evaluation's passes over held-out text say about routers and experts (formulas: `moe.sparse.diagnostics`).

The text is the same in every evaluation, so a difference is the model's. All of it is summed over the ranks.

Shapes: L sparse layers, T tokens, E experts, N rows of a layer's experts, B sequences, S positions, P = B·S places.
"""

from __future__ import annotations

import base64
import math
import statistics
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe.data.loader import Batch
from moe.distributed.mesh import Mesh
from moe.sparse import RealTokens, RouterOutput, SparseMLP
from moe.sparse.balance import max_violation
from moe.sparse.diagnostics import chosen, churn, coactivation, dependence, overlap, served_by_both
from moe.train.metrics import layered

CHURN_SEQUENCES, CHURN_POSITIONS = 16, 256  # of the held-out text, whose choices are kept between evaluations
LEFT_OUT = 2  # experts left out in each evaluation, one at a time, in a pass over one batch


class HeldOutRouting:
    """Collects over one evaluation's passes on this rank: `add` after each, then `metrics`, a collective."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        self._mesh = mesh
        self._layers = [module for module in model.modules() if isinstance(module, SparseMLP)]
        experts = [layer.gate.config.num_experts for layer in self._layers]
        self._norms = [torch.zeros(2, count, dtype=torch.float64, device=mesh.device) for count in experts]
        self._hooks = [
            layer.experts.register_forward_hook(partial(_add_norms, sums, layer.experts.first_expert))
            for layer, sums in zip(self._layers, self._norms, strict=True)
        ]
        shapes = [*zip(experts, experts, strict=True), *pairwise(experts)]
        self._pairs = [torch.zeros(shape, dtype=torch.float64, device=mesh.device) for shape in shapes]
        self._tokens = torch.zeros(1, dtype=torch.float64, device=mesh.device)
        self._choices: dict[int, Tensor] = {}  # by sample id: bool [positions, experts of all layers]

    def add(self, batch: Batch, routers: Sequence[RouterOutput]) -> None:
        """After the forward pass of `batch` (on the CPU), in which tokens that only fill up a sequence or the batch
        weren't routed."""
        length = batch.input_ids_BS.shape[1]
        layers = [chosen(routed.choices, routed.counts_E.numel()) for routed in routers]
        both = [*zip(layers, layers, strict=True), *pairwise(layers)]
        for sums, (one, other) in zip(self._pairs, both, strict=True):
            sums += served_by_both(one, other)
        self._tokens += batch.tokens
        if batch.real_T is not None:
            real = RealTokens(batch.real_T.to(self._mesh.device), *batch.input_ids_BS.shape)
            layers = [real.spread(chosen_TE) for chosen_TE in layers]
        for place, sample in enumerate(batch.sample_ids_B.tolist()):
            if 0 <= sample < CHURN_SEQUENCES:
                start = place * length
                kept = [chosen_PE[start : start + min(length, CHURN_POSITIONS)] for chosen_PE in layers]
                self._choices[sample] = torch.cat(kept, dim=1).cpu()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def metrics(self, before: str) -> tuple[dict[str, Any], list[list[list[float]]], str]:
        """(metrics, each layer's [E, E] of `coactivation`, the choices to compare the next evaluation's with); `before`
        are the last evaluation's choices, "" at the first. A collective."""
        parts = [self._tokens, *(part.flatten() for part in (*self._norms, *self._pairs))]
        summed = self._mesh.sum_(torch.cat(parts)).cpu().split([len(part) for part in parts])
        count = len(self._layers)
        norms = [sums.view(2, -1) for sums in summed[1 : 1 + count]]
        pairs = [sums.view(own.shape) for sums, own in zip(summed[1 + count :], self._pairs, strict=True)]
        tokens, within, across = float(summed[0]), pairs[:count], pairs[count:]
        lifts = [coactivation(pairs_EE, tokens) for pairs_EE in within]
        highest = torch.stack([lift_EE.nan_to_num(-math.inf).amax() for lift_EE in lifts])
        violation = torch.stack([max_violation(pairs_EE.diagonal()) for pairs_EE in within])
        metrics = layered("val_max_violation", violation)
        metrics |= layered("coactivation_lift", torch.where(highest > 0, highest, math.nan))
        if across:
            choices = [pairs_EE.diagonal().sum().item() for pairs_EE in within]
            shared = [overlap(pair, number) for pair, number in zip(across, choices[:-1], strict=True)]
            metrics |= layered("layer_overlap", torch.stack(shared))
            metrics |= layered("layer_dependence", torch.stack([dependence(pair) for pair in across]))
        metrics["expert_output_norm"] = [_mean_norms(*sums) for sums in norms]
        after = _packed(self._mesh.gather(self._choices))
        metrics |= layered("router_churn", _churn(before, after, [len(pairs_EE) for pairs_EE in within]))
        return metrics, [lift_EE.tolist() for lift_EE in lifts], after


@torch.no_grad()
def _add_norms(sums_2E: Tensor, first: int, module: nn.Module, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    """Adds, for each of this rank's experts, the L2 norms of its rows and their number. A forward hook of Experts."""
    counts_E = inputs[1]
    own = slice(first, first + len(counts_E))
    rows = torch.repeat_interleave(torch.arange(len(counts_E), device=output.device), counts_E)
    norms_N = torch.linalg.vector_norm(output[: len(rows)].float(), dim=1).double()
    sums_2E[0, own].index_add_(0, rows, norms_N)
    sums_2E[1, own] += counts_E


def _mean_norms(total_E: Tensor, rows_E: Tensor) -> list[float]:
    """NaN for an expert that served no token, infinite for one whose output was not finite."""
    return torch.where(rows_E > 0, (total_E / rows_E).nan_to_num(nan=math.inf), math.nan).tolist()


def _packed(by_rank: list[dict[int, Tensor]]) -> str:
    """All ranks' choices in the order of the samples, one bit each, as text that JSON takes."""
    samples = {sample: chosen for choices in by_rank for sample, chosen in choices.items()}
    if not samples:
        return ""
    whole = torch.stack([samples[sample] for sample in sorted(samples)]).numpy()
    return base64.b85encode(zlib.compress(np.packbits(whole).tobytes())).decode("ascii")


def _churn(before: str, after: str, experts: list[int]) -> Tensor:
    """[L] share of each layer's choices that are others than before; NaN where there is nothing to compare with."""
    unknown = torch.full((len(experts),), math.nan, dtype=torch.float64)
    if not before or not after:
        return unknown
    old, new = (
        np.unpackbits(np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8)) for text in (before, after)
    )
    if len(old) != len(new):  # other text: train.eval_sequences or train.sequence_length changed
        return unknown
    width = sum(experts)
    rows = len(new) // width
    old, new = (torch.from_numpy(bits[: rows * width].reshape(rows, width)).bool() for bits in (old, new))
    layers = zip(old.split(experts, dim=1), new.split(experts, dim=1), strict=True)
    return torch.stack([churn(one, other).double() for one, other in layers])


def oddity(norms: Sequence[float], expert: int) -> float:
    """|ln(an expert's output norm / the median of its layer's)|: infinite for an output of zeros or one that is not
    finite, 0 for an expert that served no token."""
    norm, known = norms[expert], [one for one in norms if math.isfinite(one) and one > 0]
    if math.isnan(norm):
        return 0.0
    return abs(math.log(norm / statistics.median(known))) if norm in known else math.inf


def loss_without_experts(
    model: nn.Module, batch_loss: Callable[[], Tensor], places: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """`batch_loss()` with the output of one expert set to zero, for each (layer, expert) of `places`. Each is a pass
    that every rank makes together."""
    layers = [module for module in model.modules() if isinstance(module, SparseMLP)]
    losses = []
    for layer, expert in places:
        experts = layers[layer].experts
        hook = experts.register_forward_hook(partial(_left_out, expert - experts.first_expert))
        losses.append(batch_loss())
        hook.remove()
    return losses


def experts_not_finite(model: nn.Module, mesh: Mesh) -> list[tuple[int, int]]:
    """(sparse layer, expert) of weights that are not all finite, over all ranks. A collective."""
    found = []
    for layer, module in enumerate(module for module in model.modules() if isinstance(module, SparseMLP)):
        for weight in module.experts.parameters():
            whole_E = weight.detach().flatten(1).isfinite().all(1)
            found += [(layer, module.experts.first_expert + e) for e in (~whole_E).nonzero().flatten().tolist()]
    return sorted({place for places in mesh.gather(found) for place in places})


def _left_out(local: int, module: nn.Module, inputs: tuple[Tensor, Tensor], output: Tensor) -> Tensor | None:
    """Zeros in an expert's rows, if this rank holds it. A forward hook of Experts."""
    counts = inputs[1].tolist()
    if not 0 <= local < len(counts):
        return None
    start = sum(counts[:local])
    output = output.clone()
    output[start : start + counts[local]] = 0
    return output
