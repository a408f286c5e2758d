"""`torchrun … -m moe prepare`: rank 0 writes what the other ranks encode."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from moe.cli import prepare as command
from moe.config import PrepareConfig
from moe.config.compose import load_config
from moe.data import file_parts, parts
from moe.data.prepare import prepare
from moe.errors import UserError
from tests.faults.forked import moe_ranks
from tests.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def books(tmp_path: Path) -> list[str]:
    """Overrides of a corpus of many parts of `PART` bytes."""
    dice, folder = random.Random(0), tmp_path / "books"
    folder.mkdir()
    for number in range(4):
        words = [dice.choice(["river", "stone", "light", "12", "é", str(dice.random())]) for _ in range(9000)]
        (folder / f"{number}.txt").write_text(" ".join(words))
        os.utime(folder / f"{number}.txt", (1e9, 1e9))  # no note is written of files that changed just before
    return ["data=files", f"data.path={folder}", "data.held_out=0.2", "tokenizer.vocab_size=400"]


PART = 10_000


def _prepared(overrides: list[str]) -> tuple[int, list[str]]:
    """(connected ranks, lines of the log) of this rank, with small parts."""
    parts.PART_BYTES = file_parts.PART_BYTES = PART
    config: PrepareConfig = load_config(overrides, "prepare", PrepareConfig)
    connected, logged = 0, list[str]()

    def write(config: PrepareConfig, ranks: Sequence[tuple[Connection, str]] = ()) -> None:
        nonlocal connected
        connected = len(ranks)
        prepare(config.data, config.tokenizer, log=logged.append, ranks=ranks)

    command._prepare = write
    command.run_prepare(config)
    return connected, logged


def _contents(cache: Path) -> dict[str, bytes]:
    files = (path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


def test_ranks_make_the_shards_of_one_process(books: list[str], tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    (alone,) = moe_ranks("prepare", *books, f"data.cache_dir={one}")
    assert alone.code == 0, alone.err
    (connected, logged), *others = run_ranks(3, _prepared, [*books, f"data.cache_dir={many}"], timeout=200)
    assert connected == 2
    assert others == [(0, []), (0, [])], "they write nothing"
    assert " in 2 processes in " in logged[-1]
    assert _contents(one) == _contents(many)
    (connected, logged), *_ = run_ranks(2, _prepared, [*books, f"data.cache_dir={many}"], timeout=200)
    assert not any("prepared" in line for line in logged), "the shards are there"


def test_bad_text_is_one_line_of_rank_0_and_all_ranks_end(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 " * 9)
    overrides = ["data=files", f"data.path={tmp_path / 'bad.txt'}", f"data.cache_dir={tmp_path / 'cache'}"]
    main, other = moe_ranks("prepare", *overrides, ranks=2)
    assert (main.code, other.code) == (2, 0)
    assert "bad.txt: byte 3" in main.err
    assert "Traceback" not in main.err + other.err


def _ends_at_its_first_part(overrides: list[str]) -> str:
    from moe.data import worker

    if os.environ["RANK"] == "1":
        worker.serve = lambda connection: connection.recv() and None  # type: ignore[assignment]
    try:
        _prepared(overrides)
    except UserError as error:
        return str(error)
    return ""


def test_a_rank_that_ends_is_named(books: list[str], tmp_path: Path) -> None:
    overrides = [*books, f"data.cache_dir={tmp_path / 'cache'}"]
    said = run_ranks(3, _ends_at_its_first_part, overrides, timeout=200)
    assert said[0].startswith("rank 1 on ")
    assert said[0].endswith("ended or is no longer reached: run it again")


def test_processes_are_not_stated_beside_ranks(books: list[str], tmp_path: Path) -> None:
    done = moe_ranks("prepare", *books, f"data.cache_dir={tmp_path}", "data.processes=2", ranks=2)
    assert [one.code for one in done] == [2, 2]
    assert "data.processes=2: under torchrun the ranks are the processes" in done[0].err
