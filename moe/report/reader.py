"""Reads a run's directory into plain numbers, whatever state it was left in.

A torn line (the process was killed while it wrote) is skipped and counted; a step that was trained again after a
resume counts once, with its last line. For long runs memory is bounded: expert shares are read for a few steps only.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from moe.config.migrate import migrate
from moe.errors import UserError
from moe.report.details import Details, read_coactivation

SCALARS = (
    "tokens",
    "lm_loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "max_violation",
    "dead_experts",
    "dropped_fraction",
    "val_loss",
    "val_bits_per_byte",
    "val_unigram_entropy",
)
LAYERS = "_layers"  # a number NAME beside a list NAME_layers is what the routers measured
WITHOUT_LAYERS = ("router_z_loss", "router_entropy")  # the same in earlier runs
HIGHEST_LAYER = "_highest_layer"
FRAME_NUMBERS = 60_000  # expert shares kept for the heatmap's slider, over all its steps
FRAMES = 60


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
    config: dict[str, Any]
    config_text: str
    details: Details
    torn_lines: int
    repeated_steps: int

    def last(self, key: str) -> float:
        """The last finite value, or NaN."""
        finite = self.series[key][np.isfinite(self.series[key])]
        return float(finite[-1]) if len(finite) else math.nan

    def setting(self, dotted: str) -> Any:
        """A configuration value by dotted key; None where the run's config.yaml has none."""
        value: Any = self.config
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def sparse(self) -> bool:
        return any(np.isfinite(self.series[key]).any() for key in ("max_violation", *self.router_metrics))


def read_run(run_dir: Path) -> RunHistory:
    """Raises UserError, one line naming the file and the fix."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory; give the run_dir of a `moe train`")
    metrics = run_dir / "metrics.jsonl"
    details = Details(coactivation=read_coactivation(run_dir / "coactivation.json"))
    rows, columns, torn, repeated = _read_metrics(metrics, run_dir, details)
    steps = sorted(rows)
    values = np.full((len(columns), len(steps)), math.nan)
    for index, step in enumerate(steps):
        values[: len(rows[step].scalars), index] = rows[step].scalars
    router_metrics = [name for name in columns if name + HIGHEST_LAYER in columns]
    frame_steps, frames = _read_frames(metrics, [(step, rows[step]) for step in steps if rows[step].shares])
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
        config=config,
        config_text=text,
        details=details,
        torn_lines=torn,
        repeated_steps=repeated,
    )


@dataclass(slots=True)
class _Row:
    scalars: array[float]  # of the columns known when it was read
    by_source: dict[str, float] | None
    shares: tuple[int, int] | None  # layers, experts
    offset: int  # bytes, where the line starts


def _number(value: Any) -> float:
    """A finite float, or NaN for anything else (null, NaN, text, a missing key)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if is_number else math.nan


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(byte offset, object) per line that isn't blank; None for a line that is no JSON object."""
    offset = 0
    with path.open("rb") as file:
        for raw in file:
            if raw.strip():
                try:
                    value = json.loads(raw)
                except ValueError:  # torn JSON or torn UTF-8: the caller counts it and the page says so
                    value = None
                yield offset, value if isinstance(value, dict) else None
            offset += len(raw)


def _read_metrics(path: Path, run_dir: Path, details: Details) -> tuple[dict[int, _Row], list[str], int, int]:
    """(rows by step, names of their scalars, torn lines, repeated steps)."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; train first: `moe train run_dir={run_dir}`")
    rows: dict[int, _Row] = {}
    columns = {name: None for name in SCALARS}  # ordered
    torn = repeated = lines = 0
    for offset, line in _lines(path):
        lines += 1
        step = line.get("step") if line is not None else None
        if line is None or not isinstance(step, int) or isinstance(step, bool):
            torn += 1
            continue
        repeated += step in rows
        details.take(step, line)
        measured = _router_metrics(line)
        columns |= dict.fromkeys(measured)
        by_source = line.get("val_loss_by_source")
        rows[step] = _Row(
            scalars=array("d", (measured[key] if key in measured else _number(line.get(key)) for key in columns)),
            by_source={str(name): _number(value) for name, value in by_source.items()}
            if isinstance(by_source, dict)
            else None,
            shares=_shape(line.get("expert_shares")),
            offset=offset,
        )
    if not rows:
        found = "is empty" if not lines else f"holds no step in its {lines} line{'s' * (lines > 1)}"
        raise UserError(f"{path}: {found}; train at least one step: `moe train run_dir={run_dir}`")
    return rows, list(columns), torn, repeated


def _router_metrics(line: dict[str, Any]) -> dict[str, float]:
    """Each loss and diagnostic of the routers, and its highest layer's (NaN where the run wrote none)."""
    names = [name for name in line if name in WITHOUT_LAYERS or isinstance(line.get(name + LAYERS), list)]
    measured: dict[str, float] = {}
    for name in names:
        layers = [_number(value) for value in line.get(name + LAYERS) or []]
        measured |= {name: _number(line[name]), name + HIGHEST_LAYER: max(layers, default=math.nan)}
    return measured


def _shape(shares: Any) -> tuple[int, int] | None:
    """(L, E) of a [L][E] list of numbers, None if it isn't one."""
    if not isinstance(shares, list) or not shares or not all(isinstance(layer, list) for layer in shares):
        return None
    widths = {len(layer) for layer in shares}
    if len(widths) != 1 or 0 in widths or not all(math.isfinite(_number(x)) for layer in shares for x in layer):
        return None
    return len(shares), widths.pop()


def _read_frames(path: Path, rows: list[tuple[int, _Row]]) -> tuple[list[int], list[list[list[float]]]]:
    """Expert shares at evenly spaced steps, first and last among them; as many as fit FRAME_NUMBERS."""
    if not rows:
        return [], []
    shape = rows[-1][1].shares
    assert shape is not None
    rows = [row for row in rows if row[1].shares == shape]
    count = min(FRAMES, len(rows), max(1, FRAME_NUMBERS // (shape[0] * shape[1])))
    picked = np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int)) if count > 1 else [len(rows) - 1]
    steps, frames = [], []
    with path.open("rb") as file:
        for index in picked:
            step, row = rows[index]
            file.seek(row.offset)
            steps.append(step)
            frames.append(json.loads(file.readline())["expert_shares"])
    return steps, frames


def _by_source(rows: list[dict[str, float] | None]) -> dict[str, np.ndarray]:
    names = sorted({name for row in rows if row for name in row})
    return {name: np.array([row.get(name, math.nan) if row else math.nan for row in rows]) for name in names}


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """The file's text as the run wrote it, and its values under today's keys; no rule is checked: the run is over."""
    if not path.is_file():
        return "", {}
    try:
        text = path.read_text(encoding="utf-8")
        loaded = OmegaConf.create(text)
    except (UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not readable as YAML ({reason}); restore it or remove it") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: not a mapping of keys; restore it or remove it")
    container = OmegaConf.to_container(loaded, resolve=False)
    assert isinstance(container, dict)
    try:
        return text, migrate({str(key): value for key, value in container.items()})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _read_routing(path: Path) -> Routing | None:
    """None if the run has written none, or has no router. Raises UserError where the lists don't fit together."""
    if not path.is_file():
        return None
    fix = "remove it; the next evaluation of `moe train` writes it anew"
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON; {fix}") from error
    if not isinstance(data, dict) or not isinstance(data.get("tokens"), list):
        raise UserError(f"{path}: needs the keys tokens, experts and num_experts; {fix}")
    tokens, experts, count = [str(token) for token in data["tokens"]], data.get("experts"), data.get("num_experts")
    if not experts or not tokens:
        return None
    if not isinstance(experts, list) or not isinstance(count, int):
        raise UserError(f"{path}: experts must be one list a layer and num_experts={count!r} an integer; {fix}")
    for layer, ids in enumerate(experts):
        fits = isinstance(ids, list) and len(ids) == len(tokens)
        if not fits or not all(one is None or (type(one) is int and 0 <= one < count) for one in ids):
            raise UserError(f"{path}: layer {layer} needs {len(tokens)} expert ids in 0…{count - 1}; {fix}")
    step = data.get("step")
    return Routing(step if type(step) is int else None, tokens, experts, count)


def _read_samples(path: Path) -> list[TextSample]:
    if not path.is_file():
        return []
    found = []
    for _, line in _lines(path):
        if line is not None and isinstance(line.get("text"), str):
            step = line.get("step")
            found.append(TextSample(step if type(step) is int else None, str(line.get("prompt", "")), line["text"]))
    return found
