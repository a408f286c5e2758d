"""How much a token's first expert says about the token, its position and its source: mutual information in bits.

The estimate from counts is biased upwards by about (rows−1)(columns−1)/(2N ln 2) bits, and more where tables are sparse
(Miller 1955). So each is shown with the mean of the same estimate over permutations that destroy the relation, and
corrected by subtracting it:

- token: experts are permuted among all tokens;
- position (of a token in its piece of a document, in octaves: 0, 1, 2–3, 4–7, …): inside each sequence;
- source: whole sequences are given other sequences' sources, since a sequence has one.

p = (1 + permutations at least as large) / (1 + permutations). A token that no expert took counts as an expert of its
own.

Shapes: T tokens, N observations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moe.analysis.observe import Observed


@dataclass(slots=True)
class Information:
    """Mutual information of a layer's first expert with `about`, in bits; `entropy` is the expert's own."""

    layer: int
    about: str
    entropy: float
    measured: float
    by_chance: float
    corrected: float
    p: float


def information(observed: Observed, permutations: int, seed: int) -> list[Information]:
    """Every layer × {token, position, source}; no source where there is one."""
    random = np.random.default_rng(seed)
    tokens_T = _compact(observed.ids_T)
    octaves_T = np.floor(np.log2(observed.positions_T + 1)).astype(np.int64)
    found = []
    for layer in observed.layers:
        experts_T = _compact(layer.first_T())

        def among_all(experts_T: np.ndarray = experts_T) -> float:
            return mutual_information(random.permutation(experts_T), tokens_T)

        def inside_sequences(experts_T: np.ndarray = experts_T) -> float:
            # Sequences are consecutive: sorting by (sequence, a random number) permutes inside each.
            order_T = np.lexsort((random.random(len(experts_T)), observed.sequences_T))
            return mutual_information(experts_T[order_T], octaves_T)

        def whole_sequences(experts_T: np.ndarray = experts_T) -> float:
            return mutual_information(experts_T, random.permutation(observed.sources_B)[observed.sequences_T])

        tests: list[tuple[str, np.ndarray, Callable[[], float]]] = [
            ("token", tokens_T, among_all),
            ("position", octaves_T, inside_sequences),
        ]
        if len(observed.source_names) > 1:
            tests.append(("source", observed.sources_T, whole_sequences))
        for about, values_T, permuted in tests:
            found.append(_test(layer.layer, about, experts_T, values_T, permuted, permutations))
    return found


def _test(
    layer: int,
    about: str,
    experts_T: np.ndarray,
    values_T: np.ndarray,
    permuted: Callable[[], float],
    permutations: int,
) -> Information:
    measured = mutual_information(experts_T, values_T)
    chance = np.array([permuted() for _ in range(permutations)])
    return Information(
        layer=layer,
        about=about,
        entropy=entropy(np.bincount(experts_T)),
        measured=measured,
        by_chance=float(chance.mean()),
        corrected=measured - float(chance.mean()),
        p=(1 + int((chance >= measured - 1e-12).sum())) / (1 + permutations),
    )


def mutual_information(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Σ p(x, y) log₂ p(x, y)/(p(x) p(y)) of two sequences of whole numbers ≥ 0, from their counts; bits."""
    width = int(y_N.max()) + 1
    joint = np.bincount(x_N * width + y_N)
    return max(0.0, entropy(np.bincount(x_N)) + entropy(np.bincount(y_N)) - entropy(joint))


def entropy(counts: np.ndarray) -> float:
    """−Σ p log₂ p of counts, in bits."""
    counts = counts[counts > 0]
    total = counts.sum()
    return float(np.log2(total) - (counts * np.log2(counts)).sum() / total)


def _compact(values_T: np.ndarray) -> np.ndarray:
    """The same values numbered from 0 without gaps."""
    return np.unique(values_T, return_inverse=True)[1]
