"""`launch/gpu_report.sh`, or `moe bench gpu key=value …`: measures this project on one GPU, in one command.

    moe bench gpu                                   every stage, on the GPU at hand
    moe bench gpu stages=machine,layer out=report   two of them; results go to the folder report
    moe bench gpu dry_run=true                      every stage on the CPU with tiny sizes, to find errors

Each stage is a module of this folder with `run(settings, record)`, and runs in its own process with its own time limit.
Results are written as they are recorded, so that a stage that fails or hangs keeps those that it had.

This module, `runner`, `record`, `render`, `requirements` and `moe.bench.markdown` import only the standard library, so
that a missing package fails only the stages that need it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from moe.bench.gpu.runner import STAGES, Stage, run_report
from moe.bench.gpu.settings import Settings
from moe.errors import UserError

KEYS = {"stages": ",".join(stage.name for stage in STAGES), "out": "gpu_report", "folder": "", "seconds": "540"}


def run(overrides: list[str]) -> None:
    """Raises UserError, and SystemExit(1) when a stage failed or timed out."""
    values = dict(KEYS) | {"dry_run": "false"}
    for override in overrides:
        key, separator, value = override.partition("=")
        if key not in values or not separator:
            raise UserError(f"bench gpu {override}: its keys are {', '.join(values)}")
        values[key] = value
    if values["dry_run"] not in ("true", "false"):
        raise UserError(f"dry_run={values['dry_run']} must be true or false")
    if not values["seconds"].isdecimal() or int(values["seconds"]) < 1:
        raise UserError(f"seconds={values['seconds']} must be a whole number ≥ 1: the time for all stages")
    out = Path(values["out"])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        settings = Settings(values["dry_run"] == "true", out.resolve(), values["folder"], work)
        if not run_report(_chosen(values["stages"]), settings, float(values["seconds"])):
            raise SystemExit(1)


def _chosen(names: str) -> list[Stage]:
    known = {stage.name: stage for stage in STAGES}
    for name in names.split(","):
        if name not in known:
            raise UserError(f"stages={names}: no stage {name}; one of {', '.join(known)}")
    return [known[name] for name in names.split(",")]
