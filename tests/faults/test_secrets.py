"""Secrets in the environment appear in no file and no output of a run, whether it succeeds or fails."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import forkserver
from tests.e2e.conftest import SMALL, environment
from tests.faults.forked import Finished, moe_ranks

pytestmark = pytest.mark.fault(13)
CANARY = "canary0123456789abcdefcanary0123456789ab"  # 40 characters, as W&B wants its keys
SECRETS = {name: CANARY for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MY_PASSWORD")}
SHORT = [*SMALL, "tracking=wandb", "train.steps=6", "train.eval_every=3", "train.sample_every=3"]


def _leaks(folder: Path, *outputs: str) -> list[str]:
    """Outputs and files that contain the canary, plain or compressed."""
    found = [f"output {number}" for number, text in enumerate(outputs) if CANARY in text]
    for path in folder.rglob("*"):
        if path.is_file() and any(CANARY.encode() in data for data in _forms(path.read_bytes())):
            found.append(str(path.relative_to(folder)))
    return found


def _forms(data: bytes) -> list[bytes]:
    forms = [data]
    for unpack in (gzip.decompress, zlib.decompress):
        try:
            forms.append(unpack(data))
        except (OSError, EOFError, zlib.error):
            continue  # not compressed with this method
    return forms


def test_a_leak_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "log.gz").write_bytes(gzip.compress(f"key={CANARY}".encode()))
    (tmp_path / "page.html").write_text(f"<p>{CANARY}</p>")
    assert _leaks(tmp_path, "clean", f"a{CANARY}b") == ["output 1", *(str(p.name) for p in tmp_path.rglob("*"))]


def _train(folder: Path, corpus: list[str], more: dict[str, str], *overrides: str, **keywords: object) -> Finished:
    overrides = ("train", f"run_dir={folder}", *corpus, *SHORT, *overrides)
    return moe_ranks(*overrides, more=SECRETS | more, **keywords)[0]  # type: ignore[arg-type]


def test_a_run_that_succeeds(corpus: list[str], tmp_path: Path, outcome: Callable[[str], None]) -> None:
    """Checkpoints, report, samples, configuration, metrics, W&B's offline run with its settings and logs."""
    done = _train(tmp_path, corpus, {"WANDB_MODE": "offline"})
    assert done.code == 0, done.err
    assert _leaks(tmp_path, done.out, done.err) == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"report.html", "config.yaml", "metrics.jsonl", "state.json"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    outcome(f"four secrets: in none of {len(files)} files (W&B's among them), not on stdout or stderr")


def test_an_unreachable_server(corpus: list[str], tmp_path: Path) -> None:
    more = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "1"}
    done = _train(tmp_path, corpus, more)
    assert done.code == 0, done.err
    assert "W&B can't start in mode online" in done.out
    assert _leaks(tmp_path, done.out, done.err) == []


def test_a_run_that_fails(corpus: list[str], tmp_path: Path, outcome: Callable[[str], None]) -> None:
    """A traceback, and a resume with a configuration that the checkpoint doesn't fit."""
    fault = {"kind": "fail", "steps": [6]}
    failed = _train(tmp_path, corpus, {"WANDB_MODE": "offline"}, "checkpoint.background=false", faults=(fault,))
    assert failed.code == 1
    assert "a fault on purpose" in failed.err
    misfit = _train(tmp_path, corpus, {"WANDB_MODE": "offline"}, "model.hidden_size=64")
    assert misfit.code == 2
    assert _leaks(tmp_path, failed.out, failed.err, misfit.out, misfit.err) == []
    outcome("nor in a traceback")


@pytest.mark.slow
def test_the_stacks_of_a_hang(corpus: list[str], tmp_path: Path, outcome: Callable[[str], None]) -> None:
    fault = {"FAULT": json.dumps({"kind": "sleep", "seconds": 60, "steps": [3]})}
    overrides = ["train", f"run_dir={tmp_path}", *corpus, *SHORT, "tracking=none", "guard.hang_seconds=3"]
    hung = forkserver.run(
        [sys.executable, "-m", "tests.faults.inject", *overrides],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment(SECRETS | fault),
        check=False,
    )
    assert hung.returncode != 0
    assert "no progress" in hung.stderr + hung.stdout
    assert _leaks(tmp_path, hung.stdout, hung.stderr) == []
    outcome("nor in the stacks of a hang")
