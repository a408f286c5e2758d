"""Log-likelihoods of the ends of token sequences, in batches that the ranks divide among them.

Each rank holds the whole model. Batches are formed before they are divided, so that the number of ranks changes no
result. Legend: B rows of a batch, S longest of them, H hidden, N scored tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from moe.distributed.mesh import Mesh
from moe.inference.generate import NotFiniteError
from moe.model.transformer import Transformer
from moe.sparse import read_prefixes

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Scored:
    """A sequence whose last `count` tokens are scored, each after all before it. count < len(ids)."""

    ids: list[int]
    count: int


def divided(mesh: Mesh, batches: Sequence[T], answer: Callable[[T], list[Any]]) -> list[list[Any]]:
    """`answer(batch)` of every batch, on every rank; rank r answers batches r, r + world, …. A collective. Raises what
    `answer` raises on any rank."""
    mine = mesh.agree(lambda: [answer(batch) for batch in batches[mesh.rank :: mesh.world_size]], "evaluate")
    by_rank = mesh.gather(mine)
    return [by_rank[number % mesh.world_size][number // mesh.world_size] for number in range(len(batches))]


class Scorer:
    """`model` in evaluation, on one device. Routers that aren't causal are read causally, as in training's
    evaluations."""

    def __init__(self, model: Transformer, mesh: Mesh, batch_size: int, done: Callable[[int], None]) -> None:
        """`done` is called with the number of sequences that this rank has scored since the last call."""
        self._model, self._mesh, self._batch_size, self._done = model.eval(), mesh, batch_size, done
        read_prefixes(model)

    def score(self, sequences: list[Scored]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats of the scored tokens, whether each of them is the most probable) of each sequence. A
        collective. Raises NotFiniteError.

        Too long a sequence loses tokens at its beginning, so that what is left of it before its last token fits the
        model's positions; `count` tokens must be left. Sequences that differ in their last token alone are computed
        once.
        """
        longest = self._model.config.max_position_embeddings
        places: dict[tuple[int, ...], list[int]] = {}  # input → which sequences have it
        for place, one in enumerate(sequences):
            places.setdefault(tuple(one.ids[-longest - 1 : -1]), []).append(place)
        inputs = sorted(places, key=lambda ids: (-len(ids), ids))
        batches = [inputs[start : start + self._batch_size] for start in range(0, len(inputs), self._batch_size)]

        def answer(batch: list[tuple[int, ...]]) -> list[list[tuple[float, bool]]]:
            found = self._batch(batch, [[sequences[place] for place in places[ids]] for ids in batch])
            self._done(sum(map(len, found)))
            return found

        results: list[Any] = [None] * len(sequences)
        for batch, answers in zip(batches, divided(self._mesh, batches, answer), strict=True):
            for ids, row in zip(batch, answers, strict=True):
                for place, result in zip(places[ids], row, strict=True):
                    results[place] = result
        return results

    @torch.no_grad()
    def _batch(self, batch: list[tuple[int, ...]], asked: list[list[Scored]]) -> list[list[tuple[float, bool]]]:
        """Rows are padded behind their ends, which no token before sees."""
        longest = max(map(len, batch))
        ids_BS = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in batch], device=self._model.device)
        x_BSH, _ = self._model.model(ids_BS, None, None, None)
        return [self._row(x_SH[: len(ids)], one) for x_SH, ids, one in zip(x_BSH.unbind(), batch, asked, strict=True)]

    def _row(self, x_SH: Tensor, asked: list[Scored]) -> list[tuple[float, bool]]:
        count = max(one.count for one in asked)
        logits_NV = self._model.lm_head(x_SH[-count:]).float()
        if not logits_NV.isfinite().all():
            raise NotFiniteError("the model's logits are not finite: use another checkpoint, or dtype=float32")
        logs_NV, best_N = logits_NV.log_softmax(-1), logits_NV.argmax(-1)
        results = []
        for one in asked:
            ids_N = torch.tensor(one.ids[-one.count :], device=x_SH.device)
            logs_N = logs_NV[-one.count :].gather(1, ids_N[:, None])
            results.append((float(logs_N.double().sum()), bool((best_N[-one.count :] == ids_N).all())))
        return results
