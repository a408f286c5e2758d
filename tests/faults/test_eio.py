"""One read, write, fsync, rename … anywhere in a run fails with EIO: nothing is lost in silence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import environment
from tests.faults.eio import build
from tests.faults.forked import moe_ranks
from tests.faults.live import OVERRIDES, ROOT, assert_same_run

SHORT = ["train.steps=12", "train.eval_every=6", "train.sample_every=6"]


def _failing(tmp_path: Path, corpus: list[str], points: int, ranks: int) -> list[dict[str, object]]:
    shim = build(tmp_path)
    if shim is None:
        pytest.skip("no C compiler")
    template, overrides = tmp_path / "template", [*OVERRIDES, *corpus, *SHORT]
    prepared = moe_ranks("prepare", *overrides[1:], f"data.cache_dir={template / 'cache'}")
    assert prepared[0].code == 0, prepared[0].err
    job = {"folder": str(tmp_path / "points"), "template": str(template), "overrides": overrides}
    job |= {"ranks": ranks, "points": points, "seed": 9}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.eio", json.dumps(job)],
        env=environment({"LD_PRELOAD": str(shim), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    ("points", "ranks"),
    [
        pytest.param(4, 1, marks=pytest.mark.timeout(900)),
        pytest.param(10, 2, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_a_call_that_fails_loses_nothing_in_silence(
    corpus: list[str],
    undisturbed: Callable[..., Path],
    tmp_path: Path,
    outcome: Callable[[str], None],
    points: int,
    ranks: int,
) -> None:
    kept: Counter[int] = Counter()
    for seen in _failing(tmp_path, corpus, points, ranks):
        label = f"rank {seen['rank']}, call {seen['at']}, {seen['call']}"
        said = f"{label}:\n{seen['out']}\n{seen['err']}\n{seen['again_err']}"
        assert seen["call"], said
        assert "Traceback" not in said, said
        codes = set(seen["codes"])
        assert codes in ({0}, {1}), said
        if codes == {1}:
            lines = [line for line in str(seen["err"]).splitlines() if line.startswith("moe: ")]
            assert lines, said
            assert set(seen["again"]) == {0}, said
        assert_same_run(Path(str(seen["folder"])) / "run", undisturbed(ranks, *SHORT))
        kept[codes.pop()] += 1
    outcome(
        f"{ranks} rank{'s' * (ranks > 1)}, {points} calls: {kept[0]} runs went on and ended whole, {kept[1]} ended "
        "with one line and exit code 1 and were resumed; all bitwise equal"
    )
