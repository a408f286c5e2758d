"""`moe train -m key=a,b`: the jobs that Hydra's override language makes of it, and Hydra's launchers for them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from moe.config.rules import require
from moe.config.space import parse, sweep_texts
from moe.errors import UserError

OF_HYDRA = ("hydra/launcher=", "hydra.launcher.", "hydra.sweep.dir=")


def expand(overrides: list[str]) -> list[list[str]]:
    """Every combination, the first key's values changing slowest, as Hydra numbers its jobs. Raises UserError."""
    return [list(job) for job in itertools.product(*map(_values, overrides))]


def _values(override: str) -> list[str]:
    try:
        parsed = parse(override)
    except UserError:  # a path with spaces or brackets, which is quoted when the job is composed
        return [override]
    if not parsed.is_sweep_override():
        return [override]
    key = override.partition("=")[0]
    return [f"{key}={text}" for text in sweep_texts(parsed)]


def split_hydra(overrides: list[str]) -> tuple[list[str], list[str]]:
    """(Hydra's own settings that are read here, the others). Raises UserError for other settings of Hydra's."""
    own = [one for one in overrides if one.lstrip("+").startswith(OF_HYDRA)]
    for one in overrides:
        require(
            one in own or not one.lstrip("+").startswith(("hydra.", "hydra/")),
            f"{one}: of Hydra's own settings only hydra/launcher, hydra.launcher.* and hydra.sweep.dir are read here",
        )
    return own, [one for one in overrides if one not in own]


@dataclass
class _Jobs:
    """What this file's Hydra application is composed from: a list of commands in a file, and the number of one."""

    job: int = MISSING
    file: str = MISSING


def launch(commands: list[list[str]], settings: list[str], folder: Path) -> int:
    """Gives the commands to the launcher that `settings` name; its exit code. A small Hydra application of its own, so
    that any launcher's plugin works as it does elsewhere."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(commands), encoding="utf-8")
    numbers = ",".join(map(str, range(len(commands))))
    own = [f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=${hydra.job.num}", "hydra.output_subdir=null"]
    quiet = ["hydra/job_logging=disabled", f"file={file.resolve()}", f"job={numbers}"]
    command = [sys.executable, "-m", "moe.config.multirun", "--multirun", *own, *quiet, *settings]
    return subprocess.run(command, check=False).returncode


def _job(config: DictConfig) -> None:
    """One job, wherever the launcher put it."""
    command = json.loads(Path(config.file).read_text(encoding="utf-8"))[config.job]
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise RuntimeError(f"job {config.job} ended with exit code {code}")


if __name__ == "__main__":
    ConfigStore.instance().store(name="jobs", node=_Jobs)
    hydra.main(version_base="1.3", config_path=None, config_name="jobs")(_job)()
