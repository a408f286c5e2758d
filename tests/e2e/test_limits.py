"""`ulimit` in real processes: one line that names the limit instead of a traceback."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from moe.cli.limits import OPEN_FILES, OPEN_FILES_PER_RANK
from tests.e2e.conftest import SMALL, environment

HUGE = ["model.vocab_size=200000000", "tokenizer.vocab_size=512"]  # embedding and head take 25.6 GB each


def limited(limit: int, value: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`moe OVERRIDES` in a process that has this limit."""

    def lower() -> None:
        resource.setrlimit(limit, (value, value))

    return subprocess.run(
        [sys.executable, "-m", "moe", *overrides],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment(),
        check=False,
        preexec_fn=lower,
    )


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("moe: ")]
    return line


def test_too_few_open_files_are_named_at_once() -> None:
    done = limited(resource.RLIMIT_NOFILE, 24, "train", *SMALL)
    assert done.returncode == 2, done.stderr
    assert only_line(done) == (
        "moe: ulimit -n 24: a process may open 24 files, and training on 1 rank takes up to 38: `ulimit -n 1024` in "
        "the shell that starts it"
    )


def test_as_many_as_it_asks_for_are_enough(corpus: list[str], tmp_path: Path) -> None:
    few = OPEN_FILES + OPEN_FILES_PER_RANK
    overrides = [*corpus, *SMALL, "train.steps=3", f"run_dir={tmp_path}"]
    done = limited(resource.RLIMIT_NOFILE, few, "train", *overrides)
    assert done.returncode == 0, done.stderr


def test_a_file_too_many_elsewhere_says_what_to_raise() -> None:
    program = "import os\nwhile True: os.open('/dev/null', os.O_RDONLY)"
    run = (
        f"import sys\nfrom moe.cli import main, verbs\nverbs.VERBS['report'] = lambda _: exec({program!r})\nmain.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", run, "report"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    )
    assert done.returncode == 1, done.stderr
    assert "Too many open files" in only_line(done)
    assert "`ulimit -n 4096`" in only_line(done)


@pytest.mark.parametrize("gigabytes", [4, 16])
def test_no_room_for_the_model_is_one_line(gigabytes: int, corpus: list[str], tmp_path: Path) -> None:
    limit = gigabytes * 10**9
    overrides = ["train", *corpus, *SMALL, *HUGE, f"run_dir={tmp_path}"]
    refused = limited(resource.RLIMIT_AS, limit, *overrides)
    assert refused.returncode == 2, refused.stderr
    assert "check_memory=true: this run needs about" in only_line(refused)
    insisted = limited(resource.RLIMIT_AS, limit, *overrides, "check_memory=false")
    assert insisted.returncode == 1, insisted.stderr
    line = only_line(insisted)
    assert line.startswith("moe: out of memory in moe/model/build.py:"), line
    assert f"ulimit -v is {limit // 1024} kB" in line
    assert "you tried to allocate" in line
