"""The report of `moe bench all` as JSON; its section of docs/performance.md and its plot, from the JSON alone."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moe.bench.markdown import table
from moe.bench.plot import embedded, plot
from moe.bench.processor import processor
from moe.bench.results import markdown, stated
from moe.bench.settings import counted
from moe.durable import write_durably, write_section
from moe.errors import UserError
from moe.untrusted import read_object

BEGIN, END = "<!-- cpu report: begin -->", "<!-- cpu report: end -->"
PACKAGES = ("torch", "transformers", "deepspeed")
VERSION = 1
REMOVE = "remove it, or name another file with json="


def machine() -> dict[str, Any]:
    """What results depend on beside the load."""
    model, units = processor()
    return {
        "processor": model,
        "units": units,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def code_version() -> str:
    """The commit that last changed the measured code, with a + where files differ from it; `–` outside a repository."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words, "--", "moe", "configs"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("log", "-1", "--format=%h") + ("+" if git("status", "--porcelain") else "") or "–"
    except (OSError, subprocess.CalledProcessError):
        return "–"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def new_report() -> dict[str, Any]:
    return {"version": VERSION, "machine": machine(), "benchmarks": {}}


def read_report(file: Path) -> dict[str, Any]:
    """Raises UserError for what isn't a report."""
    values = read_object(file, REMOVE)
    values.count("version", VERSION, VERSION)
    values.object("machine")
    values.object("benchmarks")
    try:
        list(section(values.values, ""))
        plot_of(values.values)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: not a report of `moe bench all` ({error!r}); {REMOVE}") from error
    return values.values


def write_report(report: dict[str, Any], file: Path, page: Path) -> None:
    """The JSON, the plot and the page's section. Raises UserError unless `page` has each marker once."""
    image = image_of(page)
    write_durably(file, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_durably(image, plot_of(report))
    write_section(page, BEGIN, END, section(report, quote(f"{image.parent.name}/{image.name}")))


def image_of(page: Path) -> Path:
    """Where a page's plot is written: a file in the folder `images` beside it, which is made. Raises UserError."""
    image = page.parent / "images" / f"{page.stem}.svg"
    try:
        image.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"page={page}: its plot can't be written to {image} ({error.strerror})") from error
    if image.is_dir():
        raise UserError(f"page={page}: its plot can't be written to {image}, a folder: remove it")
    return image


def plot_of(report: dict[str, Any]) -> str:
    """The plot's SVG."""
    where = report["machine"]
    return plot(_titled(report), f"{where['processor']}, {counted(where['cores'], 'core')}")


def _titled(report: dict[str, Any]) -> dict[str, Any]:
    return {each["title"]: each["results"] for each in report["benchmarks"].values()}


def section(report: dict[str, Any], image: str) -> Iterator[str]:
    """Markdown lines; `image` is the plot's address, as seen from the page."""
    where, benchmarks = report["machine"], report["benchmarks"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    units = ", ".join(where["units"]) or "none of the units for wide products"
    yield f"Written by `moe bench all`: {where['processor']}, {where['cores']} cores ({units}); {versions}."
    yield from ("", embedded(_titled(report), image), "")
    rows = []
    for each in benchmarks.values():
        results = each["results"]
        lines = "; ".join(stated(results["figures"])) if results else each["error"][-1]
        state, seconds = each["state"], f"{each['seconds']:.0f} s"
        rows.append([each["title"], each["started"], each["code"], state, seconds, each["load"], lines])
    yield from table(["benchmark", "date, UTC", "code", "state", "time", "load before", "result"], rows)
    for command, each in benchmarks.items():
        yield from ("", f"### {each['title']}", "", f"`{command}`: {each['about']}.", "")
        if each["results"]:
            yield from markdown(each["results"])
        else:
            yield from (f"**{each['state']}**", "", "```", *each["error"], "```")
