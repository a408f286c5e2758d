"""What the page shows as text: tokens coloured by expert, the favourites of each expert."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe.analysis.observe import LayerChoices
from moe.analysis.result import Analysis

PLACES = 2  # choices of a token that the page can colour by
SOURCES = 8  # whose text is shown
CONTEXTS_OF = 300  # experts of the shown layers: with more, contexts are in contexts.csv only

TEXT = """<figure class="routed" id="routed">
<fieldset class="layers js-only" id="sources"><legend>Source</legend></fieldset>
<fieldset class="layers js-only" id="places"><legend>Choice</legend></fieldset>
<div class="chips" role="group" aria-label="Experts: press one to see only its tokens"></div>
<div class="tokens" tabindex="0" role="region" aria-label="The text, token by token"></div>
</figure>"""


def data(analysis: Analysis) -> dict[str, Any]:
    """What page.js needs for texts and favourites."""
    return {
        "num_experts": {layer.layer: layer.num_experts for layer in analysis.observed.layers},
        "texts": _texts(analysis),
        "favourites": _favourites(analysis),
    }


def design_effects(analysis: Analysis) -> str:
    """A sentence about how much wider the errors are than those of independent tokens."""
    values = [row.design_effect for row in analysis.assignment if row.which == "all" and np.isfinite(row.design_effect)]
    if not values:
        return ""
    return f"Their variance is {np.median(values):.1f} times that of independent tokens (median of layers and sources)."


def _texts(analysis: Analysis) -> list[dict[str, Any]]:
    """Of each source the beginning of one sequence: its tokens, and their experts by place and layer; −1: none."""
    observed, piece = analysis.observed, analysis.corpus.tokenizer.piece
    shown = analysis.shown_layers()
    placed = {layer.layer: _placed(layer) for layer in observed.layers if layer.layer in shown}
    found = []
    for source, name in enumerate(observed.source_names[:SOURCES]):
        members = np.flatnonzero(observed.sources_T == source)
        if not len(members):
            continue
        start = int(members[0])
        end = start + int((observed.sequences_T == observed.sequences_T[start]).sum())
        part = slice(start, min(end, start + analysis.settings.analyze.text_tokens))
        found.append(
            {
                "source": name,
                "tokens": [piece(int(token)) for token in observed.ids_T[part]],
                "experts": [
                    {number: experts[place][part].tolist() for number, experts in placed.items()}
                    for place in range(PLACES)
                ],
            }
        )
    return found


def _placed(layer: LayerChoices) -> list[np.ndarray]:
    """For each place the expert [T] there, −1 where there is none."""
    found, places_N = [], layer.places_N
    for place in range(PLACES):
        experts_T, here_N = np.full(layer.num_tokens, -1, np.int64), places_N == place
        experts_T[layer.tokens_N[here_N]] = layer.experts_N[here_N]
        found.append(experts_T)
    return found


def _favourites(analysis: Analysis) -> dict[int, list[dict[str, Any]]]:
    """Layer → for each expert its tokens and previous tokens as (text, lift), and its contexts."""
    shown = analysis.shown_layers()
    layers = [layer for layer in analysis.observed.layers if layer.layer in shown]
    with_contexts = sum(layer.num_experts for layer in layers) <= CONTEXTS_OF
    found = {
        layer.layer: [{"token": [], "previous": [], "contexts": []} for _ in range(layer.num_experts)]
        for layer in layers
    }
    for row in (row for row in analysis.favourites if row.layer in found):
        found[row.layer][row.expert][row.where].append([row.token, row.lift])
    for context in analysis.contexts if with_contexts else ():
        if context.layer in found:
            parts = [context.source, context.weight, context.before, context.token, context.after]
            found[context.layer][context.expert]["contexts"].append(parts)
    return found
