"""The findings in a terminal: tables, samples with what is learnt in colour, the bad rows."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe.errors import shown
from moe.validate.facts import PERCENTS, Token, estimates, overview, percentiles, sample_tokens
from moe.validate.findings import Findings, Validation

LEARNT, NOT_LEARNT, SPECIAL = "black on green", "dim", "bold magenta"


def show(validation: Validation, console: Console) -> None:
    """Prints everything but the line about bad rows."""
    for found in validation.findings:
        console.print(Text(f"source {found.name!r}: {found.description}", style="bold"), soft_wrap=True)
        console.print(_pairs(overview(validation, found)))
        if found.good:
            console.print(_percentiles(found))
            _samples(validation, found, console)
    if lines := estimates(validation):
        console.print(Text("A run with these rows", style="bold"))
        console.print(_pairs(lines))
    console.print(f"read {validation.rows:,} rows in {validation.seconds:.1f} s")
    _problems(validation, console)


def _pairs(lines: list[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines:
        table.add_row(Text(name), Text(value))
    return table


def _percentiles(found: Findings) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("of a row")
    names = ["least", *(f"{percent} %" for percent in PERCENTS[1:-1]), "most", "mean"]
    for name in names:
        table.add_column(name, justify="right")
    for name, values in percentiles(found):
        table.add_row(name, *values)
    return table


def _samples(validation: Validation, found: Findings, console: Console) -> None:
    samples = sample_tokens(validation, found)
    if not samples:
        return
    legend = Text("samples: ")
    legend.append("learnt", LEARNT).append("  ").append("not learnt", NOT_LEARNT).append("  ")
    console.print(legend.append("special token", SPECIAL).append("" if console.color_system else "  ([[learnt]])"))
    for place, tokens, more in samples:
        console.print(Text(place, style="italic"), soft_wrap=True)
        console.print(_coloured(tokens, more, marked=console.color_system is None))


def _coloured(tokens: list[Token], more: int, *, marked: bool) -> Text:
    """`marked`: with [[ and ]] around what is learnt, where there are no colours."""
    text, inside = Text(), False
    for token in tokens:
        if marked and token.learnt != inside:
            text.append("[[" if token.learnt else "]]")
        inside = token.learnt
        style = f"{SPECIAL}{' on green' if token.learnt else ''}" if token.special else LEARNT if inside else NOT_LEARNT
        text.append("".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in token.text), style)
    if marked and inside:
        text.append("]]")
    return text.append(f" … {more:,} tokens more") if more else text


def _problems(validation: Validation, console: Console) -> None:
    problems, most = validation.problems, validation.config.problems
    for problem in problems[:most]:
        console.print(Text(shown(problem, 1000), style="red"), soft_wrap=True)
    if len(problems) > most:
        console.print(f"… and {len(problems) - most:,} more: problems={len(problems)} shows all, page=rows.html too")
