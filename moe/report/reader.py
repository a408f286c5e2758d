"""Reads a run's directory into plain numbers, whoever wrote it and whatever state it was left in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe.config import ModelConfig
from moe.config.migrate import migrate
from moe.config.rules import MAX_COUNT
from moe.config.saved import read_saved
from moe.errors import UserError
from moe.report.answers import AnsweredRows, read_answers
from moe.report.details import Details, read_coactivation
from moe.report.rows import HIGHEST_LAYER, read_frames, read_rows
from moe.untrusted import Values, is_count, is_real, json_lines, read_object, shown

MOST_EXPERTS = 10**5
# What the page computes with; null and a missing key are allowed.
COUNTS = (
    "model.vocab_size", "model.hidden_size", "model.intermediate_size", "model.num_hidden_layers",
    "model.num_attention_heads", "model.num_key_value_heads", "model.head_dim", "model.sliding_window",
    "router.num_experts", "train.steps", "train.global_batch_size", "train.sequence_length",
)  # fmt: skip
REALS = ("optim.max_grad_norm",)


@dataclass(slots=True)
class Routing:
    """First-choice expert of each token of one held-out text; `experts` is [L][T], None where no expert took it."""

    step: int | None
    tokens: list[str]
    experts: list[list[int | None]]
    num_experts: int


@dataclass(slots=True)
class TextSample:
    step: int | None
    prompt: str
    text: str


@dataclass(slots=True)
class RunHistory:
    """Everything the page shows. Series have one float per step, NaN where the run wrote none (or no finite one).

    `series` has SCALARS, each of `router_metrics` (names of losses and diagnostics), and their highest layer.
    """

    name: str
    steps: np.ndarray
    series: dict[str, np.ndarray]
    router_metrics: list[str]
    val_by_source: dict[str, np.ndarray]
    frame_steps: list[int]
    frames: list[list[list[float]]]  # [frame][L][E], the last one is the last step's
    routing: Routing | None
    samples: list[TextSample]
    answers: AnsweredRows | None
    config: dict[str, Any]
    config_text: str
    model: ModelConfig | None  # None where config.yaml has none, or keys that this code doesn't know
    details: Details
    torn_lines: int
    repeated_steps: int

    def last(self, key: str) -> float:
        """The last finite value, or NaN."""
        finite = self.series[key][np.isfinite(self.series[key])]
        return float(finite[-1]) if len(finite) else math.nan

    def setting(self, dotted: str) -> Any:
        """A configuration value by dotted key; None where the run's config.yaml has none."""
        return _setting(self.config, dotted)

    def layers(self, count: int) -> Sequence[int]:
        """The numbers in the model of its `count` sparse layers; from 0 on where config.yaml doesn't say which."""
        stated = range(0) if self.model is None else self.model.sparse_layer_numbers
        return stated if len(stated) == count else range(count)

    @property
    def sparse(self) -> bool:
        return any(np.isfinite(self.series[key]).any() for key in ("max_violation", *self.router_metrics))


def read_run(run_dir: Path) -> RunHistory:
    """Raises UserError, one line naming the file and the fix."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory; give the run_dir of a `moe train`")
    metrics = run_dir / "metrics.jsonl"
    details = Details(coactivation=read_coactivation(run_dir / "coactivation.json"))
    rows, columns, torn, repeated = read_rows(metrics, run_dir, details.take)
    steps = sorted(rows)
    values = np.full((len(columns), len(steps)), math.nan)
    for index, step in enumerate(steps):
        values[: len(rows[step].scalars), index] = rows[step].scalars
    router_metrics = [name for name in columns if name + HIGHEST_LAYER in columns]
    frame_steps, frames = read_frames(metrics, [(step, rows[step]) for step in steps if rows[step].shares])
    text, config = _read_config(run_dir / "config.yaml")
    return RunHistory(
        name=run_dir.resolve().name,
        steps=np.array(steps),
        series=dict(zip(columns, values, strict=True)),
        router_metrics=router_metrics,
        val_by_source=_by_source([rows[step].by_source for step in steps]),
        frame_steps=frame_steps,
        frames=frames,
        routing=_read_routing(run_dir / "routing.json"),
        samples=_read_samples(run_dir / "samples.jsonl"),
        answers=read_answers(run_dir / "answers.json"),
        config=config,
        config_text=text,
        model=_model(_setting(config, "model")),
        details=details,
        torn_lines=torn,
        repeated_steps=repeated,
    )


def _by_source(rows: list[dict[str, float] | None]) -> dict[str, np.ndarray]:
    names = sorted({name for row in rows if row for name in row})
    return {name: np.array([row.get(name, math.nan) if row else math.nan for row in rows]) for name in names}


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """The file's text as the run wrote it, and its values under today's keys; no rule is checked: the run is over."""
    if not path.exists():
        return "", {}
    try:
        text, values = read_saved(path)
    except UserError as error:
        raise UserError(f"{error}; restore it or remove it") from error
    try:
        config = migrate({str(key): value for key, value in values.items()})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    for names, holds, rule in (
        (COUNTS, _is_size, f"a whole number from 1 to {MAX_COUNT}"),
        (REALS, is_real, "a number"),
    ):
        for name in names:
            value = _setting(config, name)
            if value is not None and not holds(value):
                raise UserError(f"{path}: {name}={shown(value)} must be {rule}; restore it or remove it")
    return text, config


def _is_size(value: Any) -> bool:
    return is_count(value, MAX_COUNT) and value > 0


def _setting(config: dict[str, Any], dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _model(values: Any) -> ModelConfig | None:
    if not isinstance(values, dict):
        return None
    try:
        model: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values))
        return model
    except (UserError, OmegaConfBaseException):
        return None


def _read_routing(path: Path) -> Routing | None:
    """None if the run has written none, or has no router. Raises UserError where the lists don't fit together."""
    if not path.exists():
        return None
    fix = "remove it; the next evaluation of `moe train` writes it anew"
    data = read_object(path, fix)
    tokens = data.take("tokens", _are_texts, "a list of texts")
    experts = data.take("experts", lambda value: isinstance(value, list), "one list a layer")
    if not experts or not tokens:
        return None
    count = data.count("num_experts", 1, MOST_EXPERTS)
    for place, ids in enumerate(experts):
        fits = isinstance(ids, list) and len(ids) == len(tokens)
        if not fits or not all(one is None or is_count(one, count - 1) for one in ids):
            raise UserError(f"{path}: experts[{place}] needs {len(tokens)} expert ids in 0…{count - 1}; {fix}")
    return Routing(_step(data), tokens, experts, count)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _step(values: Values) -> int | None:
    """The step that a note is from; None where it says none."""
    return None if values.values.get("step") is None else values.count("step")


def _read_samples(path: Path) -> list[TextSample]:
    """Torn lines are left out."""
    if not path.exists():
        return []
    found = []
    for line in json_lines(path):
        if line.value is not None:
            values = Values(line.value, f"{path}:{line.number}", "remove the line")
            prompt = values.text("prompt") if "prompt" in values.values else ""
            found.append(TextSample(_step(values), prompt, values.text("text")))
    return found
