"""`moe evaluate`: the harness's tasks on a checkpoint; a table, and a JSON file.

moe evaluate checkpoint=runs/tuned tasks=sums include_path=tasks limit=100
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval.api.task
import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.utils import handle_non_serializable, make_table

from moe import __version__
from moe.checkpoint.base import model_fingerprint
from moe.checkpoint.layout import CHECKPOINTS
from moe.checkpoint.reader import read_model, resolve, tokenizer_folder
from moe.checkpoint.state import read_state
from moe.config import EvaluateConfig
from moe.config.flat import flatten
from moe.config.rules import require
from moe.data.tokenizer import load_saved
from moe.distributed import rendezvous
from moe.distributed.mesh import Mesh
from moe.durable import write_durably
from moe.errors import UserError
from moe.evaluate.guards import guarded
from moe.evaluate.harness_model import HarnessModel
from moe.evaluate.tasks import load_tasks
from moe.kernels.policy import choose_device, torch_dtype

FOLDER = "evaluation"
PACKAGES = ("lm_eval", "torch", "datasets", "numpy")


def run_evaluate(config: EvaluateConfig) -> None:
    """Prints a table and writes a JSON file, on rank 0 of those that torchrun started. Raises UserError."""
    mesh = rendezvous.start(1, flatten(config))
    try:
        began = time.monotonic()
        with _quiet(mesh), guarded(config.trust_task_code):
            folder = mesh.agree(lambda: resolve(Path(config.checkpoint).expanduser(), _warn), "checkpoint")
            path = mesh.agree(lambda: _output(config, folder), "output")
            tasks = mesh.agree(lambda: load_tasks(config), "tasks")
            lm = mesh.agree(lambda: _load(config, folder, mesh), "checkpoint")
            results = _evaluate(config, lm, tasks, mesh)
        if mesh.is_main:
            results |= _facts(config, folder, mesh) | {"seconds": time.monotonic() - began}
            write_durably(
                path, json.dumps(results, indent=1, ensure_ascii=False, default=handle_non_serializable) + "\n"
            )
            print(make_table(results))
            if "groups" in results:
                print(make_table(results, "groups"))
            print(path)
    finally:
        rendezvous.stop()


def _load(config: EvaluateConfig, folder: Path, mesh: Mesh) -> HarnessModel:
    device = mesh.device if config.device == "auto" else choose_device(config.device)
    model = read_model(folder, device=device, dtype=torch_dtype(config.dtype), check_memory=config.check_memory)
    return HarnessModel(model, load_saved(tokenizer_folder(folder)), mesh, config)


def _evaluate(config: EvaluateConfig, lm: HarnessModel, tasks: Any, mesh: Mesh) -> dict[str, Any]:
    """The harness's own results, with the random seeds of its own command."""
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    limit = config.limit if config.limit is None or config.limit < 1 else int(config.limit)
    try:
        return evaluate(  # pyright: ignore[reportReturnType]  # None only on ranks that the harness knows of
            lm=lm,
            task_dict=tasks,
            limit=limit,  # pyright: ignore[reportArgumentType]  # a share is taken too
            bootstrap_iters=config.bootstrap_iters if mesh.is_main else 0,
            log_samples=config.log_samples,
            system_instruction=config.system_instruction,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=config.fewshot_as_multiturn,
            confirm_run_unsafe_code=config.confirm_run_unsafe_code,
        )
    except UserError:
        raise
    except Exception as error:
        if lm.answering:
            raise
        raise UserError(
            f"tasks={config.tasks}: the harness can't use the task: {type(error).__name__}: {error}"
        ) from error


def _facts(config: EvaluateConfig, folder: Path, mesh: Mesh) -> dict[str, Any]:
    return {
        "config": asdict(config) | {"dtype": config.dtype.name},
        "checkpoint": {
            "path": str(folder.resolve()),
            "step": read_state(folder).step,
            "fingerprint": model_fingerprint(folder),
        },
        "packages": {"moe": __version__} | {name: version(name) for name in PACKAGES},
        "ranks": mesh.world_size,
        "device": str(mesh.device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _output(config: EvaluateConfig, folder: Path) -> Path:
    if config.output is not None:
        path = Path(config.output).expanduser()
        require(not path.is_dir(), f"output={path}: is a folder; name a file in it, as in output={path}/results.json")
    else:
        run = folder.resolve().parent.parent if folder.resolve().parent.name == CHECKPOINTS else folder
        path = run / FOLDER / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={path}: {error.strerror}: name another file") from error
    return path


@contextmanager
def _quiet(mesh: Mesh) -> Iterator[None]:
    """The harness's warnings on one rank alone; what it prints goes to stderr; no processes of its own."""
    logger = logging.getLogger("lm_eval")
    level, processes = logger.level, os.environ.get("DISABLE_MULTIPROC")
    lm_eval.api.task.eval_logger.addFilter(_says_more_than_defaults)
    logger.setLevel(logging.WARNING if mesh.is_main else logging.CRITICAL)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        lm_eval.api.task.eval_logger.removeFilter(_says_more_than_defaults)
        logger.setLevel(level)
        if processes is None:
            del os.environ["DISABLE_MULTIPROC"]


def _says_more_than_defaults(record: logging.LogRecord) -> bool:
    """False for the two lines about each metric that say that it is aggregated as it is by default."""
    return "is not. using default" not in record.getMessage()


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)
