"""What a run loads before its first step: nothing that this step doesn't use."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, Run, environment

# Trains through the command line, and ends where the first step would begin.
UNTIL_THE_FIRST_STEP = """
import json, sys
from moe.cli import main
from moe.train import loop

def first_step(*_, **__):
    print(json.dumps(sorted(sys.modules)))
    sys.stdout.flush()
    raise SystemExit(0)

loop.training_step = first_step
main.main()
"""
# torch's compiler, SymPy and Triton, the checkpoints' reader and writer, the probing of DeepSpeed's ops with a C
# compiler, and what prepares data and tracks runs.
LATER = {
    "torch._dynamo", "torch._inductor", "sympy", "triton", "torch.distributed.checkpoint", "torch.distributed.tensor",
    "distutils.ccompiler", "datasets", "transformers", "wandb",
    "pandas", "pyarrow", "lm_eval", "optuna",
}  # fmt: skip


@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_a_run_loads_no_compiler_and_no_checkpoints_before_its_first_step(
    engine: str, moe: Run, corpus: list[str], tmp_path: Path
) -> None:
    prepared = moe("prepare", *corpus, *SMALL)
    assert prepared.returncode == 0, prepared.stderr
    overrides = [*corpus, *SMALL, f"engine={engine}", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-c", UNTIL_THE_FIRST_STEP, "train", *overrides],
        capture_output=True, text=True, timeout=200, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "moe.train.loop" in loaded
    assert ("deepspeed" in loaded) == (engine == "deepspeed")
    assert not loaded & LATER
