"""Text from the run's files: tokens coloured by expert, samples, configuration. All of it is escaped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

import numpy as np

from moe.report.palette import expert_class
from moe.report.plots import embed
from moe.report.reader import Routing, RunHistory, TextSample

TOKENS_SHOWN = 1500
CHIPS = 64  # at most this many experts get a button
SAMPLES_SHOWN = 12
SAMPLE_CHARACTERS = 3000
CONFIG_CHARACTERS = 100_000


def coloured_text(routing: Routing, layers: Sequence[int]) -> str:
    """One held-out text. Each token's background is the colour of its first expert in the selected layer (initially the
    first layer); a token without an expert has none. `layers` are the numbers of the layers in the model."""
    shown = min(len(routing.tokens), TOKENS_SHOWN)
    experts = [ids[:shown] for ids in routing.experts]
    counts = Counter(experts[0])
    spans = "".join(
        f'<span class="{_token_class(expert)}" data-e="{"–" if expert is None else expert}">{_visible(token)}</span>'
        for token, expert in zip(routing.tokens[:shown], experts[0], strict=True)
    )
    radios = "".join(
        f'<label><input type="radio" name="layer" value="{place}"{" checked" if place == 0 else ""}>'
        f"<span>{layer}</span></label>"
        for place, layer in enumerate(layers)
    )
    chips = "".join(
        f'<button type="button" class="chip {expert_class(expert)}" data-e="{expert}" aria-pressed="false">'
        f"{expert}<small>{100 * counts[expert] / shown:.0f} %</small></button>"
        for expert in range(min(routing.num_experts, CHIPS))
    )
    cut = (
        f"the first {shown:,} of {len(routing.tokens):,} tokens" if shown < len(routing.tokens) else f"{shown:,} tokens"
    )
    step = f" at step {routing.step:,}" if routing.step is not None else ""
    return f"""<figure class="routed" id="routed">
<figcaption><h3>First expert of each token</h3> <span class="unit">held-out text, {cut}{step}</span></figcaption>
<fieldset class="layers js-only"><legend>Layer</legend>{radios}</fieldset>
<div class="chips" role="group" aria-label="Experts: press one to see only its tokens">{chips}
<label class="numbers js-only"><input type="checkbox"> show numbers</label></div>
<div class="tokens" tabindex="0" role="region" aria-label="The text, token by token">{spans}</div>
<script type="application/json">{embed({"layers": [*layers], "experts": experts})}</script>
</figure>"""


def _token_class(expert: int | None) -> str:
    return "t" if expert is None else f"t {expert_class(expert)}"


def _visible(token: str) -> str:
    """A token as HTML: line ends and tabs are kept and marked, control characters are written as \\xNN."""
    kept = "".join(one if one.isprintable() or one in "\n\t " else f"\\x{ord(one):02x}" for one in token)
    return escape(kept).replace("\n", "<i>⏎</i>\n").replace("\t", "<i>⇥</i>\t")


def samples(found: list[TextSample]) -> str:
    """At most SAMPLES_SHOWN samples, evenly spread over the run, newest first."""
    if len(found) > SAMPLES_SHOWN:
        picked = np.linspace(0, len(found) - 1, SAMPLES_SHOWN).round().astype(int)
        shown, note = (
            [found[index] for index in picked],
            f"{SAMPLES_SHOWN} of {len(found)}, evenly chosen; newest first.",
        )
    else:
        shown, note = found, "Newest first."
    return f'<p class="note">{note}</p><div class="samples">{"".join(map(_sample, reversed(shown)))}</div>'


def _sample(sample: TextSample) -> str:
    rest = sample.text.removeprefix(sample.prompt)  # the text may or may not repeat its prompt
    cut = "…" if len(rest) > SAMPLE_CHARACTERS else ""
    step = f"Step {sample.step:,}" if sample.step is not None else "Step unknown"
    prompt = f"<b>{escape(sample.prompt[:SAMPLE_CHARACTERS])}</b>" if sample.prompt else ""
    return f"<article><h3>{step}</h3><pre>{prompt}{escape(rest[:SAMPLE_CHARACTERS])}{cut}</pre></article>"


def configuration(run: RunHistory) -> str:
    text, cut = run.config_text[:CONFIG_CHARACTERS], len(run.config_text) > CONFIG_CHARACTERS
    lines = [_yaml_line(line) for line in text.splitlines()]
    more = "\n…" if cut else ""
    return (
        f"<details><summary>config.yaml, {len(lines)} lines</summary><pre>{chr(10).join(lines)}{more}</pre></details>"
    )


def _yaml_line(line: str) -> str:
    """The `key` of `key: value` in bold; any other line unchanged."""
    key, colon, value = line.partition(":")
    plain = colon and key.strip().replace("_", "").replace("-", "").isalnum()
    return f"<b>{escape(key)}</b>:{escape(value)}" if plain else escape(line)
