"""How often consecutive tokens share an expert (arXiv 2401.04088, table 5).

A pair is a token and the next one of the same document; a pair repeats when the sets of the two tokens' experts meet.
Sets are the first choices, the first or second ones (the paper's two measures), and, where tokens have more, all.

Two baselines. `uniform` is the paper's: sets drawn at random from E experts. `shuffled` permutes the tokens inside each
piece of a document, so that it keeps how often each piece uses each expert: uneven experts and topics repeat more by
chance, and only what exceeds this is about order. Its expectation is exact: the share of all ordered pairs of different
tokens of the piece whose sets meet. Tests are per sequence, since its tokens aren't independent: the difference of
observed and expected repetitions of each sequence, as a ratio estimate over sequences, against a normal distribution.

Shapes: T tokens, B sequences, E experts, P tokens of one piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moe.analysis.observe import LayerChoices, Observed
from moe.analysis.statistics import overlap_by_chance, ratio

MEASURES = {"first": 1, "first or second": 2, "any": None}  # choices of a token that count
BLOCK = 1024  # rows of the matrix of all pairs that are held at once


@dataclass(slots=True)
class Repetition:
    """One layer and measure; `source` is None for all of them together. z and p of the excess over each baseline."""

    layer: int
    source: str | None
    measure: str
    pairs: int
    rate: float
    error: float
    uniform: float
    uniform_z: float
    uniform_p: float
    shuffled: float
    excess: float
    excess_error: float
    excess_z: float
    excess_p: float


def repetitions(observed: Observed) -> list[Repetition]:
    """Every layer × measure × {all sources, each of several}, in this order."""
    found = []
    groups: list[tuple[str | None, np.ndarray]] = [(None, np.ones(len(observed.sources_B), bool))]
    if len(observed.source_names) > 1:
        groups += [(name, observed.sources_B == source) for source, name in enumerate(observed.source_names)]
    for layer in observed.layers:
        for measure, places in MEASURES.items():
            if places is None and layer.most_choices <= 2:
                continue
            counts = _by_sequence(observed, layer, places)
            for name, of_B in groups:
                sources_B = observed.sources_B[of_B]
                found.append(_repetition(layer.layer, name, measure, sources_B, *(row[of_B] for row in counts)))
    return found


def _repetition(
    layer: int,
    source: str | None,
    measure: str,
    sources_B: np.ndarray,
    pairs_B: np.ndarray,
    repeated_B: np.ndarray,
    shuffled_B: np.ndarray,
    uniform_B: np.ndarray,
) -> Repetition:
    rate = ratio(repeated_B, pairs_B, sources_B)
    over_uniform = ratio(repeated_B - uniform_B, pairs_B, sources_B)
    excess = ratio(repeated_B - shuffled_B, pairs_B, sources_B)
    return Repetition(
        layer=layer,
        source=source,
        measure=measure,
        pairs=int(pairs_B.sum()),
        rate=rate.value,
        error=rate.error,
        uniform=ratio(uniform_B, pairs_B).value,
        uniform_z=over_uniform.z,
        uniform_p=over_uniform.p,
        shuffled=ratio(shuffled_B, pairs_B).value,
        excess=excess.value,
        excess_error=excess.error,
        excess_z=excess.z,
        excess_p=excess.p,
    )


def _by_sequence(observed: Observed, layer: LayerChoices, places: int | None) -> tuple[np.ndarray, ...]:
    """Of each sequence: pairs, repetitions, those expected after shuffling, and those expected of random sets."""
    taken_TE = layer.taken_TE(places)
    sizes_T = taken_TE.sum(1)
    sequences = len(observed.sources_B)
    pair_T = np.flatnonzero(np.diff(observed.pieces_T) == 0)  # the first token of each pair
    of_pair = observed.sequences_T[pair_T]
    repeats = (taken_TE[pair_T] & taken_TE[pair_T + 1]).any(1)
    most = int(sizes_T.max(initial=0)) + 1
    chance = np.array([[overlap_by_chance(layer.num_experts, a, b) for b in range(most)] for a in range(most)])
    pairs_B = np.bincount(of_pair, minlength=sequences)
    repeated_B = np.bincount(of_pair, weights=repeats, minlength=sequences)
    uniform_B = np.bincount(of_pair, weights=chance[sizes_T[pair_T], sizes_T[pair_T + 1]], minlength=sequences)
    shuffled_B = np.zeros(sequences)
    bounds = np.flatnonzero(np.diff(observed.pieces_T, prepend=-1, append=observed.pieces_T[-1] + 1))
    for start, end in pairwise(bounds):
        if end - start > 1:
            shuffled_B[observed.sequences_T[start]] += (end - start - 1) * meeting_share(taken_TE[start:end])
    return pairs_B, repeated_B, shuffled_B, uniform_B


def meeting_share(taken_PE: np.ndarray) -> float:
    """The share of ordered pairs of different tokens whose sets of experts meet; P ≥ 2."""
    sets_PE = taken_PE.astype(np.float32)
    meetings = sum(int(((block @ sets_PE.T) > 0).sum()) for block in np.array_split(sets_PE, -(-len(sets_PE) // BLOCK)))
    return (meetings - int(taken_PE.any(1).sum())) / (len(taken_PE) * (len(taken_PE) - 1))
