"""Writes docs/examples/NAME.md from what a run reached. No figure on such a page is written by hand."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import moe
from moe.bench.processor import processor

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "sentencepiece")
ROOT = Path(__file__).resolve().parents[2]
SHOWN = 60  # lines of a sample that a page shows


@dataclass(frozen=True, slots=True)
class Bar:
    """One requirement and what the run reached."""

    what: str
    required: str
    reached: str
    met: bool


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """A held-out row and the model's answer; `right` where more than equality counts (None: equality)."""

    prompt: str
    expected: str
    answer: str
    right: bool | None = None

    @property
    def is_right(self) -> bool:
        return self.answer == self.expected if self.right is None else self.right


@dataclass(frozen=True, slots=True)
class Page:
    """`shows` and `notes` are Markdown; `script` is the one command, whose commands the page prints."""

    title: str
    shows: str
    script: Path
    bars: Sequence[Bar]
    tables: Sequence[Table] = ()
    samples: Sequence[Sample] = ()
    notes: str = ""
    seconds: float | None = None

    def text(self) -> str:
        command = f"bash launch/examples/{self.script.name}"
        parts = [
            f"# {self.title}",
            f"Written by `{command}`; not edited by hand."
            + ("" if self.seconds is not None else " Its commands were run in several parts, so no time is stated."),
            self.shows.strip(),
            "## Reached",
            _table(
                ("", "required", "reached", "met"),
                [(bar.what, bar.required, bar.reached, "yes" if bar.met else "**no**") for bar in self.bars],
            ),
        ]
        for table in self.tables:
            parts += [f"## {table.title}", _table(table.columns, table.rows)]
            parts += [table.note.strip()] if table.note else []
        parts += list(_samples(self.samples))
        parts += [self.notes.strip()] if self.notes else []
        parts += [
            "## Commands",
            f"`{command}` runs",
            f"```bash\n{commands(self.script)}\n```",
            "## Where",
            self._where(),
        ]
        return "\n\n".join(parts) + "\n"

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text(), encoding="utf-8")

    def _where(self) -> str:
        rows = [
            ("date", f"{datetime.now(UTC):%Y-%m-%d}"),
            ("CPU", processor()[0]),
            ("cores", len(os.sched_getaffinity(0))),
        ]
        if self.seconds is not None:
            rows.append(("time", f"{self.seconds / 60:.1f} minutes, with whatever else the machine did"))
        rows += [("commit", commit()), ("Python", platform.python_version()), ("moe", moe.__version__)]
        for name in PACKAGES:
            try:
                rows.append((name, version(name)))
            except PackageNotFoundError:
                continue
        return _table(("", ""), rows)


def command_line(usage: str | None, write: Callable[[Path], None], page: Callable[[Path], Page]) -> None:
    """`rows FOLDER` writes an example's rows into the folder, `page FOLDER FILE` what its runs there reached."""
    match sys.argv[1:]:
        case ["rows", folder]:
            write(Path(folder))
        case ["page", folder, path]:
            page(Path(folder)).write(Path(path))
        case _:
            sys.exit(usage)


def script_of(name: str) -> Path:
    return ROOT / "launch" / "examples" / f"{name}.sh"


def elapsed(folder: Path) -> float | None:
    """Seconds between the files `began` and `ended` of a script's folder, which it touches; to now without `ended`, so
    that a page can be written again later. None without `began`."""
    began, ended = folder / "began", folder / "ended"
    if not began.exists():
        return None
    return (ended.stat().st_mtime if ended.exists() else time.time()) - began.stat().st_mtime


def commands(script: Path) -> str:
    """A script without its head: what follows the line that sources launch/environment.sh and installs."""
    lines = script.read_text(encoding="utf-8").splitlines()
    begins = [number for number, line in enumerate(lines) if line.startswith("install_project")]
    body = lines[begins[-1] + 1 :] if begins else [line for line in lines if not line.startswith("#!")]
    return "\n".join(body).strip()


def commit() -> str:
    """The checkout's commit, marked where files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    return done.stdout.strip() or "not a git checkout"


def percent(right: int, of: int) -> str:
    return f"{100 * right / of:.2f} % ({right:,} of {of:,})" if of else "–"


def _samples(samples: Sequence[Sample]) -> Iterable[str]:
    for title, right in (("Right", True), ("Wrong", False)):
        chosen = [sample for sample in samples if sample.is_right is right]
        if chosen:
            yield f"## {title}: held-out samples"
            yield _table(
                ("prompt", "expected", "answer"),
                [(_code(one.prompt), _code(one.expected), _code(one.answer)) for one in chosen],
            )


def _code(text: str) -> str:
    """Text as Markdown code inside a table's cell, whatever it holds."""
    shown = "<br>".join(
        f"<code>{line.replace('&', '&amp;').replace('<', '&lt;').replace('|', '&#124;')}</code>"
        for line in text.splitlines()[:SHOWN]
    )
    return shown or "(empty)"


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("\n", " ") for cell in line) + " |" for line in lines)
