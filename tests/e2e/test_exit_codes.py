"""The exit codes of docs/reliability.md and of `moe --help`, each from real processes that end so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from moe.cli import main as cli
from tests.e2e.conftest import SMALL
from tests.faults.forked import moe_here, moe_ranks
from tests.ranks import run_until_dead

ROOT = Path(__file__).resolve().parents[2]
FEW = ["train.steps=3", "train.eval_every=100", "train.sample_every=100"]
SLEEP: tuple[dict[str, Any], ...] = ({"kind": "sleep", "seconds": 60, "steps": [2]},)
NO_ROOM = {"kind": "full_disk", "limit": 200_000}


def _stop(name: str) -> dict[str, Any]:
    return {"kind": "stop", "name": name, "steps": [2]}


# Code → (overrides, faults), and what is said on stderr.
ENDS: dict[int, list[tuple[list[str], tuple[dict[str, Any], ...], str]]] = {
    0: [([], (), "")],
    1: [([], ({"kind": "fail", "steps": [2]},), "RuntimeError: a fault on purpose")],
    2: [
        (["router.top_k=9"], (), "moe: router.top_k=9 must be ≤ router.num_experts=4"),
        (["init_from=nowhere"], (), "moe: init_from=nowhere: no checkpoint there"),
        ([], (_stop("SIGTERM"), NO_ROOM), "SIGTERM: stopped after step 2, but the checkpoint could not be saved"),
    ],
    130: [([], (_stop("SIGINT"),), "moe: SIGINT: stopped after step 2, which is saved in")],
    138: [([], (_stop("SIGUSR1"),), "moe: SIGUSR1: stopped after step 2, which is saved in")],
    143: [([], (_stop("SIGTERM"),), "moe: SIGTERM: stopped after step 2, which is saved in")],
}
HUNG = 75


@pytest.mark.parametrize(("code", "end"), [(code, end) for code, ends in ENDS.items() for end in ends])
def test_an_end_has_its_documented_code(
    corpus: list[str], tmp_path: Path, code: int, end: tuple[list[str], tuple[dict[str, Any], ...], str]
) -> None:
    overrides, faults, text = end
    (done,) = moe_ranks("train", *SMALL, *FEW, *corpus, f"run_dir={tmp_path}", *overrides, faults=faults)
    assert done.code == code, done.err
    assert text in done.err
    assert ("Traceback" in done.err) == (code == 1)


def test_a_hang_has_its_documented_code(corpus: list[str], tmp_path: Path) -> None:
    overrides = ["train", *SMALL, *FEW, *corpus, f"run_dir={tmp_path}", "guard.hang_seconds=2"]
    assert run_until_dead(1, moe_here, overrides, SLEEP, {}) == [HUNG]


def test_every_documented_code_is_tested() -> None:
    table = (ROOT / "docs" / "reliability.md").read_text().partition("| exit code |")[2].partition("\n\n")[0]
    documented = {int(code) for row in table.splitlines()[2:] for code in re.findall(r"\d+", row.split("|")[1])}
    assert documented == {*ENDS, HUNG}
    manual = " ".join((cli.__doc__ or "").partition("Exit codes:")[2].split())
    assert all(re.search(rf"\b{code}\b", manual) for code in documented)
