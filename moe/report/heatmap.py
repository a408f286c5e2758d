"""Expert shares, layer × expert, as an HTML table, which works with screen readers and on phones.

A cell's colour shows its load relative to an even share 1/E: neutral when even, blue below, orange above (strongest at
twice the even share or more). The fullest expert's load − 1 is its layer's MaxVio (arXiv 2408.15664).
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from moe.report.plots import embed

WIDE = 16  # up to this many experts, cells show numbers on a phone too
SHARE_UNIT = 10_000  # page.js gets shares as integers in units of 1/100 %


def _tint(share: float, experts: int) -> tuple[str, int]:
    """(class, strength in %) of a cell; page.js computes the same when the slider moves."""
    load = share * experts
    return ("over" if load > 1 else "under"), round(100 * min(1.0, abs(load - 1)))


def _cell(share: float, experts: int) -> str:
    style, strength = _tint(share, experts)
    dead = " dead" if share == 0 else ""
    return f'<td class="{style}{dead}" style="--p:{strength}%">{100 * share:.1f}</td>'


def _verdict(shares_LE: np.ndarray, even: float, layers: Sequence[int]) -> str:
    place, expert = np.unravel_index(int(shares_LE.argmax()), shares_LE.shape)
    most = float(shares_LE[place, expert])
    return (
        f"Fullest: expert {expert} of layer {layers[int(place)]} with {100 * most:.1f} % of its layer's choices, "
        f"{most / even:.2f} × its even share of {100 * even:.3g} %."
    )


def heatmap(steps: list[int], frames: list[list[list[float]]], layers: Sequence[int]) -> str:
    """A figure of the last frame, with a slider over the earlier ones. `frames` is [frame][L][E]; `layers` are the
    numbers of the L layers in the model."""
    shares_LE = np.array(frames[-1], dtype=float)
    experts = shares_LE.shape[1]
    even = 1 / experts
    compact = " compact" if experts > WIDE else ""
    head = "".join(f'<th scope="col">{expert}</th>' for expert in range(experts))
    rows = "".join(
        f'<tr><th scope="row">{layer}</th>{"".join(_cell(float(share), experts) for share in shares_E)}</tr>'
        for layer, shares_E in zip(layers, shares_LE, strict=True)
    )
    slider = data = ""
    if len(frames) > 1:
        last = len(frames) - 1
        slider = (
            f'<label class="slider js-only">Step <input type="range" min="0" max="{last}" value="{last}" '
            f'aria-valuetext="step {steps[-1]}"> <output>{steps[-1]:,}</output></label>'
        )
        numbers = [np.round(np.array(frame, dtype=float) * SHARE_UNIT).astype(int).ravel().tolist() for frame in frames]
        shown = {"steps": steps, "frames": numbers, "unit": SHARE_UNIT, "layers": [*layers]}
        data = f'<script type="application/json">{embed(shown)}</script>'
    return f"""<figure class="heat" id="heat" data-experts="{experts}">
<figcaption><h3>Expert share</h3> <span class="unit">% of a layer's choices, one optimizer step</span>
<p class="note">{escape(_verdict(shares_LE, even, layers))} (Last step.)</p></figcaption>
<div class="heatbar">{slider}
<div class="scale" aria-hidden="true"><span>none</span><i></i><span>even {100 * even:.3g} %</span><i class="up"></i>\
<span>≥ {200 * even:.3g} %</span></div></div>
<div class="scroll" tabindex="0" role="region" aria-label="Expert share by layer and expert">
<table class="heatmap{compact}" style="--columns:{experts}">
<caption>Rows are layers, columns are experts; numbers are per cent.</caption>
<thead><tr><th scope="col" class="corner">layer</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>
{data}</figure>"""
