"""What is larger than the shell's limits (`ulimit`) or the machine, in real processes: one line, no traceback."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from moe.checkpoint.layout import committed
from moe.checkpoint.model_writer import write_model
from moe.checkpoint.reader import load_model
from moe.cli.limits import OPEN_FILES, OPEN_FILES_PER_RANK
from moe.config.compose import read_config
from moe.data.tokenizer import load_saved
from tests.e2e.conftest import SMALL, environment
from tests.faults.forked import moe_ranks

HUGE = ["model.vocab_size=200000000", "tokenizer.vocab_size=512"]  # embedding and head take 25.6 GB each


def limited(limit: int, value: int, *overrides: str, hard: int = 0) -> subprocess.CompletedProcess[str]:
    """`moe OVERRIDES` in a process that has this limit."""

    def lower() -> None:
        resource.setrlimit(limit, (value, hard or value))

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


def test_a_soft_limit_is_raised(corpus: list[str], tmp_path: Path) -> None:
    overrides = [*corpus, *SMALL, "train.steps=3", f"run_dir={tmp_path}"]
    done = limited(resource.RLIMIT_NOFILE, 24, "train", *overrides, hard=1024)
    assert done.returncode == 0, done.stderr


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


def test_an_address_space_too_small_for_the_libraries_is_named_at_once() -> None:
    done = limited(resource.RLIMIT_AS, 900000 * 1024, "train", "tracking=none")
    assert done.returncode == 2, done.stderr
    assert only_line(done).startswith("moe: ulimit -v 900000: engine=deepspeed takes 1250000 kB of address space")


@pytest.mark.parametrize("gigabytes", [4, pytest.param(16, marks=pytest.mark.slow)])
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


# More than any machine has, of a model that any machine could start to build.
TOO_LARGE = ["model=mixtral_8x7b", "model.num_hidden_layers=1000000", "tokenizer=mistral", "tracking=none"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_too_large_to_train_is_refused_before_anything_is_built(
    ranks: int, corpus: list[str], tmp_path: Path
) -> None:
    overrides = [*corpus, *TOO_LARGE, f"run_dir={tmp_path / 'run'}", f"parallel.expert_parallel_size={ranks}"]
    done = moe_ranks("train", *overrides, ranks=ranks)
    assert [one.code for one in done] == [2] * ranks, done[0].err
    (line,) = done[0].err.splitlines()
    assert "check_memory=true: " in line
    assert "of memory, phase checkpoint (the most for working, " in line
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_too_large_to_load_is_refused(corpus: list[str], tmp_path: Path) -> None:
    (trained,) = moe_ranks("train", *corpus, *SMALL, "train.steps=3", "engine=plain", f"run_dir={tmp_path / 'run'}")
    assert trained.code == 0, trained.err
    newest, folder = committed(tmp_path / "run" / "checkpoints")[0], tmp_path / "huge"
    config = read_config(newest / "config.yaml")
    config.model.num_hidden_layers = 10**9
    write_model(folder, load_model(newest), load_saved(newest / "tokenizer"), config)
    (done,) = moe_ranks("generate", f"checkpoint={folder}", "prompt=3 plus 4")
    assert done.code == 2, done.err
    assert done.err.startswith("moe: check_memory=true: the model's weights take ")
    assert len(done.err.splitlines()) == 1
    (fits,) = moe_ranks("generate", f"checkpoint={newest}", "prompt=3 plus 4", "temperature=1e-320", "top_p=1e-300")
    (greedy,) = moe_ranks("generate", f"checkpoint={newest}", "prompt=3 plus 4", "temperature=0", "seed=7")
    assert fits.code == 0, fits.err
    assert fits.out == greedy.out


@pytest.mark.parametrize("json_too", [[], ["plan.json=true"]])
def test_a_plan_that_does_not_fit_exits_with_2(json_too: list[str]) -> None:
    (fits,) = moe_ranks("plan", "model=tiny", *json_too)
    (does_not,) = moe_ranks("plan", "model=mixtral_8x7b", *json_too)
    assert (fits.code, fits.err) == (0, "")
    assert does_not.code == 2
    assert does_not.err.startswith("moe: does not fit: needs ")
    assert len(does_not.err.splitlines()) == 1
    if json_too:
        assert [json.loads(done.out)["fits"] for done in (fits, does_not)] == [True, False]
    else:
        assert "Time of a step" in does_not.out
