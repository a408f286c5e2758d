"""What the terminal and the page say about the rows: tables of words, from the findings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe.data.record_writer import told
from moe.plan.memory import size
from moe.validate.findings import NEAR_EMPTY, Findings, Validation

PERCENTS = (0, 5, 25, 50, 75, 95, 99, 100)
MOST_TOKENS = 400  # of a sample
WORTH_A_LINE = 0.2  # share of padding


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a sample; `learnt`: it is a target."""

    text: str
    learnt: bool
    special: bool


def overview(validation: Validation, found: Findings) -> list[tuple[str, str]]:
    """(name, value) lines about a source."""
    bad, recipe = len(found.problems), validation.recipe
    lines = [("rows", f"{found.rows:,} of kind {found.kind or 'unknown'}"), ("bad rows", f"{bad:,}")]
    if not found.good:
        return lines
    copies, places = found.duplicates()
    lines.append(("duplicates", _named(copies, places)))
    few, places = found.near_empty()
    rule = f": at most {NEAR_EMPTY} tokens are learnt" if few else ""
    lines.append(("near-empty", f"{_named(few, places)}{rule}"))
    lines += [("long", line.partition(": ")[2]) for line in told(found.name, found.good, found.long, recipe)]
    tokens, targets = sum(found.lengths), sum(found.targets)
    share = f"{targets:,} of {tokens:,} tokens ({targets / tokens:.0%})"
    lines.append(("learnt", f"{share}, data.loss_on={recipe.loss_on.name}"))
    lines.append(("template", f"{recipe.template.name}; tokenizer {recipe.tokenizer.fingerprint[:16]}"))
    return lines


def _named(count: int, places: list[str]) -> str:
    more = ", …" if count > len(places) else ""
    return f"{count:,} ({', '.join(places)}{more})" if count else "0"


def percentiles(found: Findings) -> list[tuple[str, list[str]]]:
    """("tokens" or "targets", values at PERCENTS and the mean) of a row."""
    rows = []
    for name, values in (("tokens", found.lengths), ("targets", found.targets)):
        numbers = np.asarray(values)
        at = np.percentile(numbers, PERCENTS, method="lower")
        rows.append((name, [*(f"{int(value):,}" for value in at), f"{numbers.mean():,.1f}"]))
    return rows


def estimates(validation: Validation) -> list[tuple[str, str]]:
    """(name, value) lines about a run with the good rows of all sources."""
    config, plan = validation.config, validation.plan
    train, length = plan.config.train, validation.recipe.sequence_length
    sequences = sum(found.sequences["train"] for found in validation.findings)
    held_out = sum(found.sequences["held_out"] for found in validation.findings)
    everything = (sequences + held_out) * length
    filled = sum(found.filled for found in validation.findings)
    if not sequences:
        return []
    steps, per_step = -(-sequences // train.global_batch_size), plan.times.overlapped
    padding, total = 1 - filled / everything, train.steps_for(sequences)
    epochs = total * train.global_batch_size / sequences
    hardware = config.hardware
    on = f"{hardware.name}, {hardware.world_size} × {hardware.peak_tflops:g} TFLOP/s"
    fits = "" if plan.fits else ": does not fit; `moe plan` with the same keys says what would"
    lines = [
        ("sequences", f"{sequences:,} of {length} tokens to train on, {held_out:,} held out; {padding:.1%} padding"),
        ("steps", f"{steps:,} an epoch with train.global_batch_size={train.global_batch_size}"),
        ("run", f"{total:,} steps, {epochs:,.1f} epochs"),
        ("time", f"at least {_time(steps * per_step)} an epoch, {_time(total * per_step)} in all ({on})"),
        ("memory", f"{size(plan.needed_gb * 1e9)} of {hardware.memory_gb:g} GB on each rank{fits}"),
    ]
    if padding > WORTH_A_LINE:
        lines.append(("padding", f"rows fill {1 - padding:.0%} of the sequences: try another train.sequence_length"))
    return lines


def _time(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def sample_tokens(validation: Validation, found: Findings) -> list[tuple[str, list[Token], int]]:
    """(place, tokens, how many more there are) of each sample."""
    tokenizer = validation.recipe.tokenizer
    special = {token: text for text, token in tokenizer.special_tokens().items()}
    samples = []
    for place, row in found.samples:
        tokens = [
            Token(special.get(int(token)) or tokenizer.piece(int(token)), bool(learnt), int(token) in special)
            for token, learnt in zip(row.ids_T[:MOST_TOKENS], row.targets_T, strict=False)
        ]
        samples.append((place, tokens, len(row.ids_T) - len(tokens)))
    return samples
