"""The command line as users run it: real processes (tests/forkserver.py), real torchrun, a small corpus."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import forkserver

SMALL = [
    "model.vocab_size=512", "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=2",
    "model.sliding_window=24", "router.num_experts=4", "train.sequence_length=64", "train.micro_batch_size=2",
    "train.global_batch_size=4", "train.steps=40", "train.eval_every=20", "train.eval_sequences=8",
    "train.sample_every=20", "train.sample_tokens=8", "checkpoint.every=5", "optim.warmup_steps=2", "optim.lr=0.003",
    "tracking=none", "train.peak_tflops=0.1",
]  # fmt: skip

CHOICES = 4 * 64 * 2  # of experts, in each layer and step of SMALL: tokens × experts per token

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def command(overrides: tuple[str, ...], ranks: int = 1) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, "-m", "moe", *overrides]


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "MASTER"))}
    return inherited | {"OMP_NUM_THREADS": "1"} | (more or {})


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a small corpus of text; its cache is shared by the whole test run."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = (f"{a} plus {b} makes {a + b}, and {a} times {b} makes {a * b}.\n" for a in range(40) for b in range(25))
    for index in range(20):
        (folder / f"text_{index:02d}.txt").write_text("".join(line for _, line in zip(range(50), lines, strict=False)))
    cache = tmp_path_factory.mktemp("cache")
    return ["data=files", f"data.path={folder}", "data.held_out=0.2", f"data.cache_dir={cache}"]


@pytest.fixture(scope="session")
def moe() -> Run:
    """`moe(*overrides, ranks=N)` runs the command, under torchrun if N > 1, and returns the finished process.

    `anew`: Python starts anew, as for a user; otherwise it is forked.
    """

    def run(
        *overrides: str, ranks: int = 1, timeout: float = 120, more: dict[str, str] | None = None, anew: bool = False
    ) -> subprocess.CompletedProcess[str]:
        return (subprocess if anew else forkserver).run(
            command(overrides, ranks),
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment(more),
            check=False,
        )

    return run


def read_metrics(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def tied_step(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> int | None:
    """The step in which a token of two runs of SMALL chose another expert, None if there is none.

    Where two experts' scores differ only by rounding, another order of summation may choose the other expert
    (docs/parallelism.md). AssertionError if more than one choice of a layer differs, or choices of more than one step.
    """
    tied: set[int] = set()
    for here, there in zip(one, other, strict=True):
        for mine, theirs in zip(here["expert_shares"], there["expert_shares"], strict=True):
            moved = sum(abs(a - b) for a, b in zip(mine, theirs, strict=True)) * CHOICES / 2
            assert moved < 1.5, f"{moved:.0f} choices differ at step {here['step']}"
            if moved:
                tied.add(here["step"])
    assert len(tied) < 2, f"choices differ at the steps {sorted(tied)}"
    return min(tied, default=None)


def allowed_by_tie(key: str) -> float:
    """By how much a metric that counts choices, or depends on them, may differ in the step of a tie."""
    return 16 / CHOICES if key.startswith(("loss", "load_", "max_violation", "grad_norm")) else 0.0


def queued_seconds(pid: int) -> float:
    """How long the process's main thread was ready to run and waited for a core, which other load makes longer."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
