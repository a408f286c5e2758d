"""The findings as one HTML page, which loads nothing."""

from __future__ import annotations

from html import escape

from moe import __version__
from moe.errors import shown
from moe.report.shell import document
from moe.validate.facts import PERCENTS, Token, estimates, overview, percentiles, sample_tokens
from moe.validate.findings import Findings, Validation

STYLE = """
.row { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.9 var(--mono); background: var(--card);
  border: 1px solid var(--hair); border-radius: 8px; padding: 10px 14px; margin: 6px 0 16px; }
.row span { color: var(--muted); border-right: 1px dotted var(--hair); }
.row .learnt { background: light-dark(#bfe8c9, #1e5a35); color: var(--ink); }
.row .special { font-weight: 700; color: light-dark(#97418c, #e090d3); }
td, th { padding: 2px 14px 2px 0; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.numbers td, .numbers th { text-align: right; }
.bad li { font: 13px/1.6 var(--mono); overflow-wrap: anywhere; }
"""


def page(validation: Validation) -> str:
    """The whole page."""
    bad = len(validation.problems)
    content = "".join(_source(validation, found) for found in validation.findings)
    if lines := estimates(validation):
        content += f"<section><h2>A run with these rows</h2>{_pairs(lines)}</section>"
    if bad:
        items = "".join(f"<li>{escape(shown(problem, 1000))}</li>" for problem in validation.problems)
        content += f'<section><h2>Bad rows</h2><ol class="bad">{items}</ol></section>'
    names = ", ".join(found.description for found in validation.findings)
    return document(
        kind="Rows",
        name=names,
        brief=[f"{validation.rows:,} rows", f"{bad:,} bad"],
        content=content,
        footer=f"moe {__version__}",
        scripts=[],
        styles=[STYLE],
    )


def _source(validation: Validation, found: Findings) -> str:
    text = f"<section><h2>Source {escape(found.name)}</h2>{_pairs(overview(validation, found))}"
    if found.good:
        names = ["least", *(f"{percent} %" for percent in PERCENTS[1:-1]), "most", "mean"]
        head = "".join(f"<th>{name}</th>" for name in ["of a row", *names])
        body = "".join(
            f"<tr><th>{name}</th>{''.join(f'<td>{value}</td>' for value in values)}</tr>"
            for name, values in percentiles(found)
        )
        text += f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        text += '<h3>Samples</h3><div class="row"><span class="learnt">learnt</span> <span>not learnt</span> '
        text += '<span class="special">special token</span></div>'
    for place, tokens, more in sample_tokens(validation, found):
        rest = f" … {more:,} tokens more" if more else ""
        text += f'<h3>{escape(place)}</h3><div class="row">{"".join(map(_token, tokens))}{rest}</div>'
    return f"{text}</section>"


def _pairs(lines: list[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in lines)
    return f"<table>{rows}</table>"


def _token(token: Token) -> str:
    classes = " ".join(name for name, holds in (("learnt", token.learnt), ("special", token.special)) if holds)
    return f'<span class="{classes}">{escape(token.text)}</span>' if classes else f"<span>{escape(token.text)}</span>"
