"""The page of an analysis: opens anywhere, without a network; plotly's script is in it, once.

As with a run's report, nothing outside the page is asked for, its content policy forbids it, and all text is escaped
(here) or set as text (page.js).
"""

from __future__ import annotations

import math
from html import escape
from typing import Any

from plotly.offline import get_plotlyjs

from moe import __version__
from moe.analysis import charts, texts
from moe.analysis.result import Analysis
from moe.report.plots import embed
from moe.report.scales import short
from moe.report.shell import asset, document

TABLE_P = 1e-4  # smaller probabilities are shown as such


def render(analysis: Analysis) -> str:
    """The whole page."""
    data = {"figures": charts.figures(analysis), "by_layer": charts.layer_figures(analysis)} | texts.data(analysis)
    return document(
        kind="Routing analysis",
        name=_name(analysis),
        brief=_brief(analysis),
        bar=f'<nav class="bar js-only" aria-label="Layer"><div>{_layers(analysis)}</div></nav>',
        content='<noscript><p class="empty">Charts, texts and tokens need JavaScript; the tables and the CSV files '
        "don't.</p></noscript>" + "".join(_section(*section) for section in _sections(analysis)),
        footer=f"moe {__version__} · checkpoint {analysis.checkpoint} · corpus {analysis.corpus.fingerprint[:16]} · "
        "the numbers are in analysis.json and the CSV files beside this page",
        before_scripts=f'<script type="application/json" id="data">{embed(_finite(data))}</script>',
        scripts=[get_plotlyjs(), asset("moe.analysis", "page.js")],
        styles=[asset("moe.analysis", "page.css")],
    )


def _sections(analysis: Analysis) -> list[tuple[str, str, str, str]]:
    """(id, heading, note, content) in the page's order."""
    observed = analysis.observed
    return [
        (
            "assignment",
            "Experts by source",
            "Each source's choices by expert, in the chosen layer. The dashed line is even routing, 1/E; the grey band "
            "is ± 2 standard deviations of random routing of independent tokens. Error bars are 95 % intervals over "
            "sequences: tokens of one sequence aren't independent, so an expert is unusual for a source where its bar, "
            "with its error, leaves the band. " + texts.design_effects(analysis),
            _row("assignment-all", "All choices") + _row("assignment-first", "First choices"),
        ),
        (
            "repetition",
            "Consecutive tokens with the same expert",
            "Pairs of neighbours in one document. Random routing: 1/E for the first choice, 1 − C(E−k, k)/C(E, k) for "
            "k of them. Shuffled: the same tokens in another order inside each document, which keeps how often it "
            "uses each expert; z and p test the excess over that, per sequence (normal approximation, "
            f"{len(observed.sources_B)} sequences).",
            _pair([_row(name, label) for name, label in _repetition_charts(analysis)]) + _repetition_table(analysis),
        ),
        (
            "information",
            "What decides the first expert",
            "Mutual information of a token's first expert with the token, its position in the document (in octaves) "
            "and its source, less its mean over permutations that break the relation.",
            _row("information", "Mutual information, less chance") + _information_table(analysis),
        ),
        (
            "text",
            "Text by expert",
            "Held-out text, each token on the colour of its expert in the chosen layer.",
            texts.TEXT,
        ),
        (
            "favourites",
            "What each expert takes",
            "Tokens that an expert takes more often than its share of all choices would give (the number: how many "
            "times as often); the tokens before them; places to which the router gave it the most weight.",
            '<div id="favourites"></div>',
        ),
        (
            "worth",
            "What each expert is worth",
            _worth_note(analysis),
            ""
            if analysis.leave_out is None
            else _row("worth", "Loss when left out, all sources")
            + _row("worth-of-layer", "Loss when left out, by source, in the chosen layer"),
        ),
        (
            "similarity",
            "Similarity of experts",
            "Weights: cosine of two experts' parameters; hidden units can be reordered without changing an expert, so "
            "near 0 doesn't mean different, while clearly above 0 means a common origin or training. Outputs: mean "
            "cosine of what two experts compute for the same token, which reordering doesn't change.",
            _pair([_row("similarity-weights", "Weights"), _row("similarity-outputs", "Outputs")]),
        ),
    ]


def _section(key: str, heading: str, note: str, content: str) -> str:
    return (
        f'<section aria-labelledby="h-{key}"><h2 id="h-{key}">{escape(heading)}</h2>\n'
        f'<p class="note about">{escape(note)}</p>\n{content}\n</section>\n'
    )


def _row(name: str, label: str) -> str:
    return (
        f'<figure class="chart"><figcaption><h3>{escape(label)}</h3></figcaption>'
        f'<div class="figure" data-figure="{escape(name)}" role="img" aria-label="{escape(label)}"></div></figure>'
    )


def _pair(figures: list[str]) -> str:
    return f'<div class="grid-of-charts pair">{"".join(figures)}</div>'


def _name(analysis: Analysis) -> str:
    return analysis.run.resolve().name


def _brief(analysis: Analysis) -> list[str]:
    observed = analysis.observed
    experts = sorted({layer.num_experts for layer in observed.layers})
    shown = len(analysis.shown_layers())
    cut = [f"{shown} of them here one by one, all in the files"] if shown < len(observed.layers) else []
    loss = float(observed.nats_B.sum() / max(1, observed.targets_B.sum()))
    return [
        f"step {analysis.step:,}",
        f"{len(observed.layers)} sparse layers of {' or '.join(map(str, experts))} experts",
        *cut,
        f"{len(observed.ids_T):,} held-out tokens in {len(observed.sources_B)} sequences",
        f"sources: {', '.join(observed.source_names)}",
        f"loss {short(loss)} nats per token of these",
    ]


def _layers(analysis: Analysis) -> str:
    radios = "".join(
        f'<label><input type="radio" name="layer" value="{layer}"{" checked" if index == 0 else ""}>'
        f"<span>{layer}</span></label>"
        for index, layer in enumerate(analysis.shown_layers())
    )
    return f'<fieldset class="layers" id="layers"><legend>Layer</legend>{radios}</fieldset>'


def _repetition_charts(analysis: Analysis) -> list[tuple[str, str]]:
    measures = dict.fromkeys(row.measure for row in analysis.repetition)
    return [(f"repetition-{measure.replace(' ', '-')}", f"Same expert: {measure} choice") for measure in measures]


def _repetition_table(analysis: Analysis) -> str:
    rows = []
    for row in analysis.repetition:
        shares = [_percent(share) for share in (row.rate, row.uniform, row.shuffled)]
        excess = f"{100 * row.excess:+.1f} ± {100 * row.excess_error:.1f}"
        first = [str(row.layer), row.source or "all", row.measure]
        rows.append([*first, *shares, excess, f"{row.excess_z:.1f}", _p(row.excess_p)])
    head = ["layer", "source", "choice", "repeated", "random", "shuffled", "over shuffled", "z", "p"]
    return _table("Repetitions, % of pairs; ± standard error", head, rows)


def _information_table(analysis: Analysis) -> str:
    rows = []
    for row in analysis.information:
        bits = [f"{value:.4f}" for value in (row.entropy, row.measured, row.by_chance, row.corrected)]
        rows.append([str(row.layer), row.about, *bits, _p(row.p)])
    head = ["layer", "about", "entropy", "measured", "by chance", "corrected", "p"]
    return _table("Mutual information, bits", head, rows)


def _table(caption: str, head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(value)}</td>" for value in row) + "</tr>" for row in rows)
    return (
        f"<details><summary>{escape(caption)}: {len(rows)} rows</summary>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="numbers-table"><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div></details>'
    )


def _worth_note(analysis: Analysis) -> str:
    if analysis.leave_out is None:
        return f"Not measured: {analysis.why_not_left_out}."
    found = analysis.leave_out
    return (
        "How much the loss rises when the router's choices of the expert are dropped and the weights of each token's "
        "other choices are scaled to the sum they had; nobody takes its tokens over. "
        f"{found.sequences} sequences, {found.tokens:,} tokens, loss {short(found.loss)} with all experts; paired "
        "differences with 95 % intervals over sequences."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _p(probability: float) -> str:
    if math.isnan(probability):
        return "–"
    return f"< {TABLE_P:g}" if probability < TABLE_P else f"{probability:.2g}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
