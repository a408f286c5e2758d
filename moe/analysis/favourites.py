"""The tokens and contexts that each expert takes most.

Tokens are ordered by how many more of them the expert took than its share of all choices would give: a token that is
frequent and one that is exclusive both count. Contexts are the places where the router gave the expert most weight.

Shapes: T tokens, N choices of a layer, E experts, V different tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moe.analysis.observe import LayerChoices, Observed

TOKENS = 10  # of each expert and list
CONTEXTS = 5
BEFORE, AFTER = 12, 6  # tokens of a context around its own


@dataclass(slots=True)
class Favourite:
    """A token, how often the expert took it, and that over what the expert's share of all choices would give.

    With `where="previous"` it is the token before those that the expert took, in the same document.
    """

    layer: int
    expert: int
    where: str
    token: str
    token_id: int
    taken: int
    occurrences: int
    lift: float


@dataclass(slots=True)
class TokenContext:
    """A place to which the router gave the expert a large weight: the document's text before, the token, text after."""

    layer: int
    expert: int
    source: str
    weight: float
    before: str
    token: str
    after: str


def favourites(observed: Observed, piece: Callable[[int], str]) -> list[Favourite]:
    """Every layer × expert × {the token itself, the previous one}, most taken first; `piece` gives a token's text."""
    values_V, tokens_T = np.unique(observed.ids_T, return_inverse=True)
    follows_T = np.diff(observed.pieces_T, prepend=-1) == 0
    found = []
    for layer in observed.layers:
        previous_N = layer.tokens_N[follows_T[layer.tokens_N]] - 1
        experts_N = layer.experts_N[follows_T[layer.tokens_N]]
        for where, places_N, takers_N, there in (
            ("token", layer.tokens_N, layer.experts_N, tokens_T),
            ("previous", previous_N, experts_N, tokens_T[:-1][follows_T[1:]]),
        ):
            counts_VE = np.zeros((len(values_V), layer.num_experts), np.int64)
            np.add.at(counts_VE, (tokens_T[places_N], takers_N), 1)
            occurrences_V = np.bincount(there, minlength=len(values_V))
            for expert, value, expected in most_taken(counts_VE, TOKENS):
                found.append(
                    Favourite(
                        layer=layer.layer,
                        expert=expert,
                        where=where,
                        token=piece(int(values_V[value])),
                        token_id=int(values_V[value]),
                        taken=int(counts_VE[value, expert]),
                        occurrences=int(occurrences_V[value]),
                        lift=float(counts_VE[value, expert] / expected),
                    )
                )
    return found


def most_taken(counts_VE: np.ndarray, limit: int) -> list[tuple[int, int, float]]:
    """(expert, value, choices expected by chance) of each expert's `limit` values with the largest positive excess."""
    total = counts_VE.sum()
    if not total:
        return []
    expected_VE = counts_VE.sum(1, keepdims=True) * counts_VE.sum(0, keepdims=True) / total
    excess_VE = counts_VE - expected_VE
    order_VE = np.argsort(-excess_VE, axis=0, kind="stable")[:limit]
    return [
        (expert, int(value), float(expected_VE[value, expert]))
        for expert in range(counts_VE.shape[1])
        for value in order_VE[:, expert]
        if excess_VE[value, expert] > 0
    ]


def contexts(observed: Observed, piece: Callable[[int], str]) -> list[TokenContext]:
    """Of every layer and expert up to `CONTEXTS` places of different tokens and sequences, most weight first."""
    bounds = np.searchsorted(observed.pieces_T, np.arange(int(observed.pieces_T[-1]) + 2))

    def text(start: int, end: int) -> str:
        return "".join(piece(int(token)) for token in observed.ids_T[start:end])

    found = []
    for layer in observed.layers:
        for expert in range(layer.num_experts):
            for choice in _heaviest(observed, layer, expert):
                at = int(layer.tokens_N[choice])
                first, last = bounds[observed.pieces_T[at] : observed.pieces_T[at] + 2]
                found.append(
                    TokenContext(
                        layer=layer.layer,
                        expert=expert,
                        source=observed.source_names[observed.sources_T[at]],
                        weight=float(layer.weights_N[choice]),
                        before=text(max(int(first), at - BEFORE), at),
                        token=text(at, at + 1),
                        after=text(at + 1, min(int(last), at + 1 + AFTER)),
                    )
                )
    return found


def _heaviest(observed: Observed, layer: LayerChoices, expert: int) -> list[int]:
    """Indices of choices."""
    own = np.flatnonzero(layer.experts_N == expert)
    picked: list[int] = []
    tokens, sequences = set[int](), set[int]()
    for choice in own[np.argsort(-layer.weights_N[own], kind="stable")]:
        at = layer.tokens_N[choice]
        token, sequence = int(observed.ids_T[at]), int(observed.sequences_T[at])
        if token not in tokens and sequence not in sequences:
            picked.append(int(choice))
            tokens.add(token)
            sequences.add(sequence)
        if len(picked) == CONTEXTS:
            break
    return picked
