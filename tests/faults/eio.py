"""Runs of `moe` in each of which one call on a file fails with EIO, and the same command again after it.

    LD_PRELOAD=eio.so python -m tests.faults.eio '{"folder": …, "template": …, "overrides": …, "ranks": 1, "points": …}'

eio.so is tests/faults/eio.c, compiled. Each run gets a folder of its own, a copy of `template`, that holds its data
cache and run directory. `points` is a number of calls, evenly spread over a run's and moved at random by `seed`, of
ranks in turn, or a list of [rank, call]. Each line of stdout is JSON: a point and what was seen.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.forked import Finished, moe_here
from tests.ranks import run_ranks


def build(folder: Path) -> Path | None:
    """The compiled shim, None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    library = folder / "eio.so"
    source = Path(__file__).with_name("eio.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def _shim() -> Any:
    library = ctypes.CDLL(None)
    library.eio_calls.restype = ctypes.c_long
    library.eio_failed.restype = ctypes.c_char_p
    library.eio_arm.argtypes = [ctypes.c_char_p, ctypes.c_long]
    return library


def _armed(overrides: list[str], folder: str, faulty_rank: int, at: int) -> tuple[Finished, int, str]:
    """A run in this forked process: what came of it, its calls on files in `folder`, and the call that failed."""
    shim = _shim()
    shim.eio_arm(folder.encode(), at if int(os.environ["RANK"]) == faulty_rank else 0)
    done = moe_here(overrides, (), {})
    calls, failed = shim.eio_calls(), shim.eio_failed().decode()
    shim.eio_arm(b"", 0)
    return done, calls, failed


def main(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    ranks, template = job["ranks"], Path(job["template"])

    def run(folder: Path, rank: int, at: int) -> list[tuple[Finished, int, str]]:
        overrides = [*job["overrides"], f"data.cache_dir={folder / 'cache'}", f"run_dir={folder / 'run'}"]
        return run_ranks(ranks, _armed, overrides, str(folder), rank, at, timeout=240)

    def anew(rank: int, at: int) -> tuple[Path, list[tuple[Finished, int, str]]]:
        folder = Path(job["folder"], f"{rank}-{at}")
        shutil.copytree(template, folder)
        return folder, run(folder, rank, at)

    points = job["points"]
    if isinstance(points, int):
        folder = Path(job["folder"], "count")
        shutil.copytree(template, folder)
        calls = [count for _, count, _ in run(folder, 0, 0)]
        draw = random.Random(job["seed"])
        places = [(index % ranks, (index + draw.random()) / points) for index in range(points)]
        points = [(rank, 1 + int(place * calls[rank])) for rank, place in places]
    for rank, at in points:
        folder, done = anew(rank, at)
        while not done[rank][2]:  # it waited less than in the run that was counted: its last call fails instead
            at = done[rank][1]
            folder, done = anew(rank, at)
        again = run(folder, 0, 0) if any(one.code for one, _, _ in done) else []
        yield {
            "rank": rank,
            "at": at,
            "folder": str(folder),
            "call": done[rank][2],
            "codes": [one.code for one, _, _ in done],
            "out": "".join(one.out for one, _, _ in done),
            "err": "".join(one.err for one, _, _ in done),
            "again": [one.code for one, _, _ in again],
            "again_err": "".join(one.err for one, _, _ in again),
        }


if __name__ == "__main__":
    for seen in main(json.loads(sys.argv[1])):
        print(json.dumps(seen), flush=True)
