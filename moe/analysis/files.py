"""The files of an analysis: analysis.json (everything), a CSV file for each table, analysis.html."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe import __version__
from moe.analysis.page import render
from moe.analysis.result import Analysis
from moe.durable import write_durably

PAGE = "analysis.html"


def write_files(analysis: Analysis, folder: Path) -> Path:
    """Writes the files into `folder` and returns the page's path. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite_or_null(as_dict(analysis)), ensure_ascii=False, indent=1, allow_nan=False)
    write_durably(folder / "analysis.json", text.encode("utf-8", errors="replace"))
    for name, rows in tables(analysis).items():
        write_durably(folder / f"{name}.csv", _csv(rows).encode("utf-8", errors="replace"))
    write_durably(folder / PAGE, render(analysis).encode("utf-8", errors="replace"))
    return folder / PAGE


def as_dict(analysis: Analysis) -> dict[str, Any]:
    """Everything that analysis.json says; numbers may be NaN or infinite."""
    observed, names = analysis.observed, analysis.observed.source_names
    sources = [
        {
            "name": name,
            "description": description,
            "sequences": int((observed.sources_B == index).sum()),
            "tokens": int((observed.sources_T == index).sum()),
            "loss": analysis.loss_of(index),
        }
        for index, (name, description) in enumerate(zip(names, analysis.corpus.descriptions, strict=True))
    ]
    return {
        "moe": __version__,
        "checkpoint": str(analysis.checkpoint),
        "step": analysis.step,
        "settings": asdict(analysis.settings.analyze),
        "corpus": analysis.corpus.fingerprint,
        "sources": sources,
        "layers": [{"layer": layer.layer, "num_experts": layer.num_experts} for layer in observed.layers],
        "assignment": [asdict(row) for row in analysis.assignment],
        "repetition": [asdict(row) for row in analysis.repetition],
        "information": [asdict(row) for row in analysis.information],
        "favourites": [asdict(row) for row in analysis.favourites],
        "contexts": [asdict(row) for row in analysis.contexts],
        "similarity": [asdict(row) for row in analysis.similarity],
        "leave_out": None if analysis.leave_out is None else asdict(analysis.leave_out),
        "why_not_left_out": analysis.why_not_left_out or None,
    }


def finite_or_null(value: Any) -> Any:
    """The same tree without what JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite_or_null(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tables(analysis: Analysis) -> dict[str, list[dict[str, Any]]]:
    """The rows of each CSV file, by its name."""
    found = {
        "assignment": list(_assignment_rows(analysis)),
        "repetition": [asdict(row) | {"source": row.source or "all"} for row in analysis.repetition],
        "information": [asdict(row) for row in analysis.information],
        "favourites": [asdict(row) for row in analysis.favourites],
        "contexts": [asdict(row) for row in analysis.contexts],
        "similarity": list(_similarity_rows(analysis)),
        "leave_out": list(_leave_out_rows(analysis)),
    }
    return {name: rows for name, rows in found.items() if rows}


def _assignment_rows(analysis: Analysis) -> Iterator[dict[str, Any]]:
    for row in analysis.assignment:
        for expert, (share, error) in enumerate(zip(row.shares_E, row.errors_E, strict=True)):
            yield {
                "layer": row.layer, "source": row.source, "which": row.which, "expert": expert, "share": share,
                "error": error, "uniform": row.uniform, "random_error": row.random_error,
            }  # fmt: skip


def _similarity_rows(analysis: Analysis) -> Iterator[dict[str, Any]]:
    for row in analysis.similarity:
        experts = range(len(row.weights_EE))
        for one, other in ((one, other) for one in experts for other in experts if one < other):
            weights, outputs = row.weights_EE[one][other], row.outputs_EE[one][other]
            yield {"layer": row.layer, "expert": one, "other": other, "weights": weights, "outputs": outputs}


def _leave_out_rows(analysis: Analysis) -> Iterator[dict[str, Any]]:
    for row in analysis.leave_out.experts if analysis.leave_out else ():
        shown = {"layer": row.layer, "expert": row.expert, "share": row.share}
        yield shown | {"source": "all", "rise": row.rise, "error": row.error}
        if len(row.by_source) > 1:
            for name, (rise, error) in row.by_source.items():
                yield shown | {"source": name, "rise": rise, "error": error}


def _csv(rows: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO()
    table = [dict(row) for row in rows]
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
