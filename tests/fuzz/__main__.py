"""`python -m tests.fuzz [cases=2000] [seed=0] [area=NAME] [page=docs/reliability.md]`: runs seeded cases of bad input.

No case may print a traceback, end by a signal, hang, end with exit code 0 where the input is known to be unusable, or
print more or less than one line of error. `page` gets the summary, between its markers. Exit code 1 on any fault.
"""

from __future__ import annotations

import itertools
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import Process
from pathlib import Path

from datasets import Dataset

from moe.data.tokenizer import load_saved
from moe.durable import write_section
from tests.fuzz.areas import AREAS, ONE_STEP, SHARES
from tests.fuzz.run import Case, Ended, Running, run

BEGIN, END = "<!-- fuzz: begin -->", "<!-- fuzz: end -->"
AT_ONCE = 2
TEXT = "The quick brown fox counts {} apples and {} pears, which makes {} of them.\n"


def prepare(folder: Path) -> Path:
    """A small corpus in several formats, tokenizers, and the directory of a finished run, which is returned."""
    (folder / "text").mkdir(parents=True)
    lines = [TEXT.format(a, b, a + b) for a in range(20) for b in range(20)]
    for index in range(20):
        (folder / "text" / f"{index:02d}.txt").write_text("".join(lines[20 * index : 20 * index + 20]))
    Dataset.from_dict({"text": lines[:40]}).to_parquet(folder / "rows.parquet")
    Dataset.from_dict({"text": lines[:40]}).to_json(folder / "rows.jsonl")
    data = ["data=files", f"data.path={folder / 'text'}", "data.held_out=0.2", f"data.cache_dir={folder / 'cache'}"]
    done = run(Case("", "", ["train", *ONE_STEP, *data, "run_dir=run", "train.steps=2", "checkpoint.every=1"]), folder)
    assert done.code == 0, done.err
    (saved,) = sorted((folder / "run" / "checkpoints").glob("step_*/tokenizer"))[:1]
    (folder / "tokenizer.model").write_bytes(next(iter(load_saved(saved).files().values())))
    _write_tokenizer_json(folder / "tokenizer.json", lines)
    return folder / "run"


def _write_tokenizer_json(path: Path, lines: list[str]) -> None:
    """In a process of its own: the library's threads would make later forks unsafe."""

    def write() -> None:
        from tokenizers import ByteLevelBPETokenizer

        made = ByteLevelBPETokenizer()
        made.train_from_iterator(lines, vocab_size=400, special_tokens=["<s>", "</s>"])
        made.save(str(path))

    process = Process(target=write)
    process.start()
    process.join()
    assert process.exitcode == 0


def cases(count: int, seed: int, area: str | None) -> Iterator[tuple[int, str]]:
    """(number, area) of each case; a case is a function of seed and number alone."""
    names = [name for name, share in SHARES.items() for _ in range(share)]
    for number in range(count):
        name = area or names[number % len(names)]
        yield seed * 1_000_003 + number, name


def fuzz(count: int, seed: int, area: str | None, say: Callable[[str], None]) -> list[tuple[int, Ended]]:
    """Runs the cases, two at a time; faults are said as they come."""
    with tempfile.TemporaryDirectory(prefix="moe-fuzz-") as name:
        done = prepare(Path(name) / "base")
        waiting, running, ended = cases(count, seed, area), dict[int, tuple[Running, Path]](), []
        while True:
            for number, chosen in itertools.islice(waiting, AT_ONCE - len(running)):
                folder = Path(name) / str(number)
                folder.mkdir()
                running[number] = Running(AREAS[chosen](random.Random(number), folder, done), folder), folder
            if not running:
                return ended
            time.sleep(0.005)
            for number, (case, folder) in list(running.items()):
                if (result := case.poll()) is not None:
                    del running[number]
                    shutil.rmtree(folder, ignore_errors=True)
                    ended.append((number, result))
                    if result.fault:
                        say(describe(number, result))


def describe(number: int, ended: Ended) -> str:
    tail = " | ".join(ended.err.splitlines()[-3:])[-500:]
    case = ended.case
    return f"case {number} ({case.area}, {case.name!r}): {ended.fault}: {case.arguments!r} {case.environment}: {tail}"


def summary(ended: list[tuple[int, Ended]], seed: int, seconds: float) -> list[str]:
    """Markdown: a row an area, with exit codes and faults."""
    lines = ["| area | cases | exit code 0 | 1 | 2 | faults |", "| --- | --- | --- | --- | --- | --- |"]
    for area in AREAS:
        mine = [one for _, one in ended if one.case.area == area]
        codes = Counter(one.code for one in mine)
        faults = sum(bool(one.fault) for one in mine)
        lines.append(f"| {area} | {len(mine):,} | {codes[0]:,} | {codes[1]:,} | {codes[2]:,} | {faults} |")
    return [*lines, "", f"Seed {seed}, {len(ended):,} cases in {seconds / 60:.0f} minutes."]


def main(arguments: list[str]) -> int:
    keys = dict(argument.split("=", 1) for argument in arguments)
    count, seed = int(keys.get("cases", 2000)), int(keys.get("seed", 0))
    started = time.monotonic()
    ended = fuzz(count, seed, keys.get("area"), lambda line: print(line, flush=True))
    lines = summary(ended, seed, time.monotonic() - started)
    print("\n".join(lines))
    if page := keys.get("page"):
        write_section(Path(page), BEGIN, END, lines)
    return int(any(one.fault for _, one in ended))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
