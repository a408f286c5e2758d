"""The report's content: the tiles at the top and the charts of each section."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from moe.report.plots import Chart, Reference, Series, finite, line_chart
from moe.report.reader import RunHistory
from moe.report.rows import ANSWERS, HIGHEST_LAYER
from moe.report.scales import count, downsample, short

RECENT = 20  # steps to average over: single steps are noisy
COUNTED = ("max_violation", "dead_experts", "dropped_fraction")  # charted whether or not they come per layer
STYLES = 6  # line styles of page.css: colours and dashes


def tiles(run: RunHistory) -> str:
    """The last values as a definition list."""
    val, unigram, violation = run.last("val_loss"), run.last("val_unigram_entropy"), run.last("max_violation")
    rate = finite(run.series["tokens_per_second"])
    asked, done = run.setting("train.steps"), int(run.steps[-1])
    gap = unigram - val
    entries = [
        ("Validation loss", short(val), "nats", _best(run)),
        ("Bits per byte", short(run.last("val_bits_per_byte")), "", "held-out text, any tokenizer"),
        (
            "Below unigram",
            short(gap),
            "nats",
            f"unigram entropy {short(unigram)}"
            if gap >= 0 or math.isnan(gap)
            else "worse than token frequencies alone",
        ),
        ("MaxVio", short(violation), "", _recent_violation(run)),
        (
            "Speed",
            count(float(np.median(rate))) if len(rate) else "–",
            "tokens/s",
            _mfu(run),
        ),
        ("Steps", f"{done:,}", f"of {asked:,}" if asked is not None else "", _tokens(run)),
    ]
    return "<dl class=tiles>" + "".join(_tile(*entry) for entry in entries) + "</dl>"


def _tile(name: str, value: str, unit: str, note: str) -> str:
    unit = f" <small>{escape(unit)}</small>" if unit else ""
    return f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{unit}<span>{escape(note)}</span></dd></div>"


def _best(run: RunHistory) -> str:
    values = run.series["val_loss"]
    if not np.isfinite(values).any():
        return "no evaluation yet"
    best = int(np.nanargmin(values))
    last = int(np.flatnonzero(np.isfinite(values))[-1])
    at = f"per token, at step {run.steps[last]:,}"
    return at if best == last else f"{at}; best {short(float(values[best]))} at {run.steps[best]:,}"


def _recent_violation(run: RunHistory) -> str:
    if not run.sparse:
        return "dense model: no router"
    recent = finite(run.series["max_violation"])[-RECENT:]
    return f"0 is even; mean of last {len(recent)}: {short(float(recent.mean()))}" if len(recent) else ""


def _mfu(run: RunHistory) -> str:
    mfu = finite(run.series["mfu"])
    return f"median; {100 * float(np.median(mfu)):.3g} % of peak FLOP/s" if len(mfu) else "median over steps"


def _tokens(run: RunHistory) -> str:
    tokens = run.last("tokens")
    return f"{count(tokens)} tokens" if math.isfinite(tokens) else ""


def _series(run: RunHistory, key: str, name: str, style: str = "s0", *, evaluations: bool = False) -> Series:
    return Series(name, downsample(run.steps, run.series[key], sparse=evaluations), style, dots=evaluations)


def _gaps(run: RunHistory, key: str) -> str:
    """A sentence that counts the steps for which a curve has no finite value; empty when there are none."""
    missing = int((~np.isfinite(run.series[key])).sum())
    return f"{missing:,} of {len(run.steps):,} steps have no finite value here." if 0 < missing < len(run.steps) else ""


def _reference(name: str, value: float) -> list[Reference]:
    return [Reference(name, value)] if math.isfinite(value) else []


def loss_charts(run: RunHistory) -> str:
    main = Chart(
        "Loss",
        "nats per token",
        [_series(run, "lm_loss", "training"), _series(run, "val_loss", "validation", "s1", evaluations=True)],
        _reference("unigram entropy", run.last("val_unigram_entropy")),
        note="The unigram line is what token frequencies alone reach on the held-out text. " + _gaps(run, "lm_loss"),
        tall=True,
    )
    by_source = [
        Series(name, downsample(run.steps, values, sparse=True), f"s{index % STYLES}", dots=True)
        for index, (name, values) in enumerate(run.val_by_source.items())
    ]
    bits = [_series(run, "val_bits_per_byte", "validation", "s1", evaluations=True)]
    charts = [
        _draw(run, Chart("Validation loss by source", "nats per token", by_source), "by-source")
        if len(by_source) > 1
        else "",
        _draw(run, Chart("Bits per byte", "bits per byte of held-out text", bits), "bits-per-byte"),
    ]
    return _condensed(run) + _draw(run, main, "loss") + _grid(charts, "pair")


def answer_chart(run: RunHistory) -> str:
    """The metrics of answers to held-out rows that the run has."""
    there = [name for name in ANSWERS if np.isfinite(run.series[name]).any()]
    series = [_series(run, name, name, f"s{index}", evaluations=True) for index, name in enumerate(there)]
    return _draw(run, Chart("Answers", "share of the rows asked", series, floor=0.0), "answers")


def _condensed(run: RunHistory) -> str:
    """A note that each point is the mean of several steps; empty when each is one step."""
    stride = downsample(run.steps, run.steps.astype(float)).stride
    text = f"In every curve of this page a point is the mean of about {stride:,} steps, and the band is their range."
    return f'<p class="note condensed">{text}</p>' if stride > 1 else ""


def training_charts(run: RunHistory) -> str:
    clip = run.setting("optim.max_grad_norm")
    norm = Chart(
        "Gradient norm",
        "before clipping",
        [_series(run, "grad_norm", "gradient norm")],
        _reference("clipped at", float(clip)) if clip is not None else [],
        note=_gaps(run, "grad_norm"),
        floor=0.0,
        may_log=True,
    )
    speed = Chart(
        "Tokens per second", "tokens/s, all ranks", [_series(run, "tokens_per_second", "tokens/s")], floor=0.0
    )
    optimizer = "AdamW and Muon" if run.setting("optim.kind") == "muon" else "AdamW"
    rate = Chart("Learning rate", optimizer, [_series(run, "lr", "learning rate")], floor=0.0)
    return _grid([_draw(run, rate, "lr"), _draw(run, norm, "grad-norm"), _draw(run, speed, "speed")])


def balance_charts(run: RunHistory) -> str:
    """Charts derived from the experts' counts, and one for each loss and diagnostic of the routers."""
    counted = [
        Chart(
            "MaxVio",
            "fullest expert",
            _mean_and_highest(run, "max_violation", "mean"),
            note="The fullest expert's load over an even one, minus 1.",
            floor=0.0,
            least_span=0.1,
        ),
        Chart(
            "Dead experts",
            "expert–layer pairs",
            [_series(run, "dead_experts", "dead experts")],
            note=_dead(run),
            floor=0.0,
            least_span=1.0,
            integer=True,
        ),
        Chart(
            "Dropped choices",
            "share",
            [_series(run, "dropped_fraction", "dropped")],
            note="Dropless: no capacity limit." if _dropless(run) else "Choices over an expert's capacity.",
            floor=0.0,
            least_span=0.01,
            percent=True,
        ),
    ]
    names = [name for name in run.router_metrics if name not in COUNTED]
    first = [*counted, *(_KNOWN[name](run, name) for name in names if name in _KNOWN)]
    others = [_measured(run, name) for name in names if name not in _KNOWN]
    drawn = [_draw(run, chart, f"balance-{index}") for index, chart in enumerate([*first, *others])]
    more = _grid(drawn[len(first) :])
    folded = f"<details><summary>{len(others)} more, each by its name</summary>{more}</details>"
    return _grid(drawn[: len(first)]) + (folded if more else "")


def _measured(run: RunHistory, name: str) -> Chart:
    """The chart of a loss or diagnostic that isn't in `_KNOWN`."""
    title = name.replace("_", " ").capitalize()
    return Chart(title, "over the layers", _mean_and_highest(run, name, "mean"))


def _mean_and_highest(run: RunHistory, name: str, label: str) -> list[Series]:
    """One curve for all layers and, where the run has it, one for the highest; dots for what only evaluations have."""
    rare = bool(np.isfinite(run.series[name]).mean() < 0.5)
    series = [_series(run, name, label, evaluations=rare)]
    if name + HIGHEST_LAYER in run.series:
        series.append(_series(run, name + HIGHEST_LAYER, "highest layer", "s1", evaluations=rare))
    return series


def _load_balancing_loss(run: RunHistory, name: str) -> Chart:
    return Chart(
        "Load-balancing loss",
        "E Σ f·P, unscaled",
        [_series(run, name, "mean"), _series(run, name + HIGHEST_LAYER, "worst layer", "s1")],
        [Reference("minimum", 1.0)],
        note="1.0 is an even load, the formula's minimum.",
        least_span=0.02,
    )


def _router_entropy(run: RunHistory, name: str) -> Chart:
    experts = run.setting("router.num_experts")
    if not experts and run.frames:
        experts = len(run.frames[-1][0])
    return Chart(
        "Router entropy",
        "nats per token",
        [_series(run, name, "router entropy")],
        _reference("undecided, ln E", math.log(experts)) if experts is not None and experts > 1 else [],
        note="0: every token is sure of one expert.",
        floor=0.0,
    )


def _router_z_loss(run: RunHistory, name: str) -> Chart:
    return Chart(
        "Router z-loss",
        "mean of squared log-sum-exp",
        [_series(run, name, "z-loss")],
        note="Keeps the router's logits small.",
        floor=0.0,
        may_log=True,
    )


# Charts with their own titles and notes; any other metric of a router gets a generic chart.
_KNOWN = {
    "load_balancing_loss": _load_balancing_loss,
    "router_entropy": _router_entropy,
    "router_z_loss": _router_z_loss,
}


def _dead(run: RunHistory) -> str:
    dead = finite(run.series["dead_experts"])
    if not len(dead):
        return ""
    most = int(dead.max())
    return f"Pairs without a token; never more than {most:,} in a step." if most else "None in any step."


def _dropless(run: RunHistory) -> bool:
    dropped = finite(run.series["dropped_fraction"])
    return "router" in run.config and run.setting("router.capacity_factor") is None and not dropped.any()


def _draw(run: RunHistory, chart: Chart, key: str) -> str:
    """Every chart spans the whole run, so that a step has the same x position in all of them."""
    chart.span = (int(run.steps[0]), int(run.steps[-1]))
    return line_chart(chart, key)


def _grid(charts: list[str], kind: str = "") -> str:
    shown = [chart for chart in charts if chart]
    return f'<div class="grid-of-charts {kind}">{"".join(shown)}</div>' if shown else ""
