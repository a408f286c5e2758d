"""`moe bench prepare`: megabytes of text a second and core that become token shards, and what more processes bring.

    moe bench prepare                                     text, JSONL and rows for fine-tuning; 1 process and all cores
    moe bench prepare processes=8 megabytes=96 rounds=5
    moe bench prepare data.path=corpus.jsonl              your own; all keys of `moe prepare`

Without `data.path` the corpora are made of the Python sources of this environment, the standard library's first,
tokenized by Mistral's model.
Rounds alternate which number of processes goes first; each prepares anew in a temporary folder. CPU time is that of all
processes, started and ended ones included: `MB/s a core` is text divided by it, whatever else the machine does.
"""

from __future__ import annotations

import json
import resource
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from moe.bench.results import Results, ResultTable
from moe.bench.settings import counted, load, spread
from moe.config import PrepareConfig
from moe.config.compose import load_config
from moe.cores import usable_cpus
from moe.data.prepare import prepare
from moe.errors import UserError

TOKENIZER = ["tokenizer=mistral", "model.vocab_size=32000"]
MADE = {  # corpus → keys that read it
    "text": ["data.path={}/text"],
    "jsonl": ["data.path={}/rows.jsonl"],
    "sft": ["data=sft", "data.path={}/chats.jsonl", "train.sequence_length=2048"],
}
SMALL = 1 << 16  # bytes of a library file that is left out: too large for a row


@dataclass(kw_only=True, slots=True)
class Keys:
    """`rounds` of one preparation with 1 process and one with `processes` (0: as many as cores, at least 2) each;
    corpora of `megabytes`."""

    rounds: int = 3
    processes: int = 0
    megabytes: int = 64

    def __post_init__(self) -> None:
        self.processes = self.processes or max(2, usable_cpus())
        for name, least in (("rounds", 1), ("processes", 2), ("megabytes", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be ≥ {least}")


@dataclass(frozen=True, slots=True)
class Prepared:
    """One preparation: bytes of text, seconds, CPU seconds of all processes and of the one that prepares."""

    bytes: int
    wall: float
    cpu: float
    own: float


def run(overrides: list[str]) -> Results:
    """The last lines are `MB/s a core N.NN` and `N processes ÷ 1: N.NN`, of the first corpus. Raises UserError."""
    keys, rest = split(overrides)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if any(override.startswith(("data.path=", "data.sources", "+data.sources", "data=")) for override in rest):
            corpora = {"yours": rest}
        else:
            write_corpora(folder, keys.megabytes * 1_000_000)
            corpora = {kind: [*TOKENIZER, *(one.format(folder) for one in own), *rest] for kind, own in MADE.items()}
        measured = {kind: measure(given, keys, folder) for kind, given in corpora.items()}
    many = f"{keys.processes} processes"
    columns = ["corpus", "MB", "MB/s a core", "1 process", many, "ratio", "per round", "main, %"]
    rate, _, _, ratio = next(iter(measured.values()))[1:5]
    return Results(
        [ResultTable(columns, [[kind, *row] for kind, row in measured.items()])],
        [
            f"medians of {counted(keys.rounds, 'alternating round')} on {usable_cpus()} cores, "
            f"{load()} at the end; MB/s of wall-clock but for `a core`, which is of CPU "
            "time, reading twice and hashing included; `main` is the share of the CPU time of the one process that "
            "hands out parts and writes"
        ],
        {"MB/s a core {}": float(rate), f"{many} ÷ 1: {{}}": float(ratio)},
    )


def split(overrides: list[str]) -> tuple[Keys, list[str]]:
    """This benchmark's keys, and the others. Raises UserError."""
    own: dict[str, int] = {}
    rest = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in {one.name for one in fields(Keys)}:
            rest.append(override)
        elif not value.isdecimal():
            raise UserError(f"{override} must be a whole number ≥ 1")
        else:
            own[key] = int(value)
    return replace(Keys(), **own), rest


def measure(overrides: list[str], keys: Keys, folder: Path) -> list[Any]:
    """A row of the table."""
    rounds: list[dict[int, Prepared]] = []
    for index in range(keys.rounds):
        counts = (1, keys.processes) if index % 2 == 0 else (keys.processes, 1)
        rounds.append({count: once(overrides, count, folder) for count in counts})
    size = rounds[0][1].bytes / 1e6
    rate = statistics.median(size / each[1].cpu for each in rounds)
    speeds = [statistics.median(size / each[count].wall for each in rounds) for count in (1, keys.processes)]
    ratios = [each[1].wall / each[keys.processes].wall for each in rounds]
    ratio = statistics.median(ratios)
    share = statistics.median(each[keys.processes].own / each[keys.processes].cpu for each in rounds)
    return [round(size, 1), rate, *speeds, ratio, spread(ratios), 100 * share]


def once(overrides: list[str], processes: int, folder: Path) -> Prepared:
    """Prepares into a new cache folder."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        config: PrepareConfig = load_config(
            [*overrides, f"data.cache_dir={cache}", f"data.processes={processes}"], "prepare", PrepareConfig
        )
        own, others = cpu_seconds(resource.RUSAGE_SELF), cpu_seconds(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        corpus = prepare(
            config.data, config.tokenizer, sequence_length=config.train.sequence_length, log=lambda line: None
        )
        wall = time.perf_counter() - start
        own, others = cpu_seconds(resource.RUSAGE_SELF) - own, cpu_seconds(resource.RUSAGE_CHILDREN) - others
    return Prepared(sum(stream.bytes for stream in (*corpus.train, *corpus.held_out)), wall, own + others, own)


def cpu_seconds(of: int) -> float:
    """Of `resource.RUSAGE_SELF`, or of the processes that have ended (RUSAGE_CHILDREN)."""
    used = resource.getrusage(of)
    return used.ru_utime + used.ru_stime


def write_corpora(folder: Path, size: int) -> None:
    """The same texts as files of about a megabyte, as rows, and as prompts and answers."""
    (folder / "text").mkdir()
    texts, total = [], 0
    for text in _sources():
        texts.append(text)
        total += len(text.encode())
        if total >= size:
            break
    groups = max(1, total // 1_000_000)
    for number in range(groups):
        (folder / f"text/{number:04d}.txt").write_text("\n".join(texts[number::groups]), encoding="utf-8")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as rows:
        rows.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as chats:
        chats.writelines(f"{json.dumps(row)}\n" for text in texts for row in _turns(text))


def _sources() -> Iterator[str]:
    """Python's own, then those of the installed packages."""
    for folder in map(Path, (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))):
        for path in sorted(folder.rglob("*.py")):
            installed = {"site-packages", "dist-packages"} & {*path.relative_to(folder).parts}
            if installed or not path.is_file() or path.stat().st_size >= SMALL:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # of Python's own tests of encodings
                continue
            if text.strip():
                yield text


def _turns(text: str) -> Iterator[dict[str, str]]:
    """Pairs of neighbouring paragraphs."""
    paragraphs = [one for one in text.split("\n\n") if one.strip()]
    for prompt, completion in zip(paragraphs[::2], paragraphs[1::2], strict=False):
        yield {"prompt": prompt, "completion": completion}
