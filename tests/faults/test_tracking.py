"""W&B without a key, unreachable or killed: training continues with one warning and an offline copy of every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, read_metrics
from tests.faults.forked import Finished, moe_ranks
from tests.unit.train.test_tracking import history

pytestmark = pytest.mark.fault(10)
WANDB = [*SMALL, "tracking=wandb", "train.steps=12", "train.eval_every=100", "train.sample_every=100"]


def _train(folder: Path, corpus: list[str], more: dict[str, str], *faults: dict[str, object]) -> tuple[Finished, str]:
    """Runs training, which must finish with metrics of every step; returns it and its warnings."""
    (done,) = moe_ranks(
        "train", f"run_dir={folder}", *corpus, *WANDB, more={"NETRC": str(folder / "none")} | more, faults=faults
    )
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, 13))
    warnings = [line for line in done.out.splitlines() if line.startswith("warning: ")]
    return done, "\n".join(warnings)


def _complete(folder: Path, run: str = "offline-run-*") -> None:
    (path,) = folder.glob(f"wandb/{run}/*.wandb")
    steps, metrics = history(path), read_metrics(folder)
    assert [step["_step"] for step in steps] == [line["step"] for line in metrics]
    assert [step["train/loss"] for step in steps] == [line["loss"] for line in metrics]


def test_no_key(corpus: list[str], tmp_path: Path, outcome: Callable[[str], None]) -> None:
    _, warnings = _train(tmp_path, corpus, {})
    assert len(warnings.splitlines()) == 1
    assert warnings.startswith("warning: W&B is offline (no key")
    _complete(tmp_path)
    outcome("no key: one warning, all 12 steps in the offline run")


def test_a_key_but_no_server(corpus: list[str], tmp_path: Path, outcome: Callable[[str], None]) -> None:
    key = "0123456789" * 4
    unreachable = {"WANDB_API_KEY": key, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2"}
    _, warnings = _train(tmp_path, corpus, unreachable)
    assert len(warnings.splitlines()) == 1, warnings
    assert "W&B can't start in mode online" in warnings
    assert "wandb sync" in warnings
    _complete(tmp_path)
    assert key not in "".join(path.read_text(errors="ignore") for path in tmp_path.rglob("*") if path.is_file())
    outcome("server unreachable: the same")


@pytest.mark.parametrize("step", [7, 12])
def test_a_killed_service(step: int, corpus: list[str], tmp_path: Path, outcome: Callable[[str], None]) -> None:
    """At step 12 only `finish` can notice. The steps that the killed service held in memory come from metrics.jsonl."""
    kill = {"kind": "kill_wandb", "steps": [step]}
    _, warnings = _train(tmp_path, corpus, {"WANDB_MODE": "offline"}, kill)
    first, stopped = warnings.splitlines()
    assert first.startswith("warning: W&B is offline")
    assert stopped.startswith("warning: W&B stopped (")
    assert "has every step" in stopped
    second = stopped.partition("/wandb/")[2].split()[0]
    _complete(tmp_path, second)
    outcome("service killed during the run or in its last step: one warning, a new offline run with all 12 steps")
