"""Weights & Biases: the only file that imports wandb.

W&B must never cost a training run: no key or no network means offline (sync later with `wandb sync`). Its service is a
process of its own, which keeps the newest 32 KiB in memory: if it dies, an offline run is started in its place and
gets everything again from metrics.jsonl and samples.jsonl. A second failure ends W&B's part; each is one warning.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from html import escape
from pathlib import Path
from typing import Any

from moe.config import Config
from moe.durable import write_durably
from moe.errors import UserError
from moe.report.matrix import matrix_page
from moe.report.page import routing_page
from moe.train.panels import Matrix, panels
from moe.train.wandb_key import BASE_URL, NETRC, find_key
from moe.untrusted import read_text

Warn = Callable[[str], None]
ONLINE_SECONDS = 15.0  # until the server must have answered; WANDB_INIT_TIMEOUT says otherwise
OFFLINE_SECONDS = 60.0  # until W&B's service must have: a busy machine may take a while to start a process


class WandbRun:
    """One run in W&B, which may end before training does. `facts` is shown beside the configuration."""

    def __init__(self, config: Config, run_dir: Path, facts: dict[str, Any], *, resumed: bool, warn: Warn) -> None:
        self._config, self._folder, self._facts, self._warn = config, run_dir, facts, warn
        self._layers = config.model.sparse_layer_numbers
        self._again = True
        self._run: Any = self._start(resumed)

    def log(self, metrics: dict[str, Any]) -> None:
        """A step's metrics, as `moe.train.panels` says."""
        if self._run is not None:
            self._guarded(lambda run: self._log(run, metrics))

    def alert(self, text: str) -> None:
        """A collapse alarm."""
        if self._run is not None:
            self._guarded(lambda run: run.alert(title="collapse alarm", text=text))

    def sample(self, sample: dict[str, Any]) -> None:
        """{"step", "prompt", "text"}."""
        if self._run is not None:
            self._guarded(lambda run: _log_sample(run, sample))

    def routing(self, routing: dict[str, Any]) -> None:
        """{"step", "tokens", "experts", "num_experts"}, as routing.json has it."""
        if self._run is not None:
            self._guarded(
                lambda run: _log_page(run, "samples/routing", routing_page(routing, self._layers), routing["step"])
            )

    def report(self, path: Path) -> None:
        """The report as an artifact of the run, if `tracking.report`."""
        if self._run is not None and self._config.tracking.report:
            self._guarded(lambda run: run.log_artifact(str(path), name=f"report-{run.id}", type="report"))

    def close(self) -> None:
        finished = None
        while self._run is not finished:  # if finishing fails, an offline run has replaced this one
            finished = self._run
            self._guarded(_finish)

    def _init(self, mode: str, run_id: str) -> Any:
        import wandb

        tracking = self._config.tracking
        stated = os.environ.get("WANDB_INIT_TIMEOUT", ONLINE_SECONDS)
        seconds = OFFLINE_SECONDS if mode == "offline" else float(stated)
        return wandb.init(
            project=tracking.project,
            name=tracking.name or self._folder.name,
            group=tracking.group,
            tags=tracking.tags,
            id=run_id,
            resume="allow" if mode == "online" else None,
            config=_plain(asdict(self._config)) | {"facts": self._facts},
            dir=str(self._folder),
            mode=mode,  # type: ignore[arg-type]  # wandb checks what the user put into WANDB_MODE
            settings=wandb.Settings(silent=True, console="off", init_timeout=seconds),
        )

    def _start(self, resumed: bool) -> Any:
        key, wrong = find_key()
        mode, why = _mode(key, wrong)
        identity = self._folder / "wandb_id"
        if not (resumed and identity.exists()):
            write_durably(identity, secrets.token_hex(4))
        run_id = read_text(identity).strip()
        if not re.fullmatch(r"[\w-]{1,64}", run_id):
            raise UserError(
                f"{identity}: {run_id[:40]!r} is no id of a W&B run: remove the file, and the run gets another"
            )
        failed = ""
        for attempt, attempt_id in ((mode, run_id), ("offline", secrets.token_hex(4))):
            try:
                run = self._init(attempt, attempt_id)
            except Exception as error:  # of wandb, its service or the network: none may end the run
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                failed += f"W&B can't start in mode {attempt} ({reason}); "
                continue
            if attempt == "offline":
                path = f"{self._folder}/wandb/offline-run-*-{attempt_id}"
                self._warn(f"{failed or why}`wandb sync {path}` uploads the run later")
            return run
        self._warn(f"{failed}metrics.jsonl has every metric")
        return None

    def _log(self, run: Any, metrics: dict[str, Any]) -> None:
        import numpy as np
        import wandb

        step, every = metrics["step"], self._config.tracking.detail_every
        detailed = step % every == 0 or step in (1, self._config.train.steps)
        logged: dict[str, Any] = {}
        for name, value in panels(metrics, layers=self._layers, detailed=detailed).items():
            if isinstance(value, Matrix):
                logged[name] = wandb.Histogram(np_histogram=np.histogram(value.values(), bins=32))
                logged[f"{name}_heatmap"] = _page(matrix_page(name, value.rows, self._layers))
            else:
                logged[name] = value
        run.log(logged, step=step)

    def _guarded(self, action: Callable[[Any], object]) -> None:
        """Calls `action` with the W&B run. After one failure an offline run replaces it; after two, W&B is off."""
        try:
            action(self._run)
        except Exception as error:  # no error of W&B may end the run
            self._run = None
            reason = f"W&B stopped ({type(error).__name__}: {error})"
            _end_service()
            if not self._again:
                self._warn(f"{reason}; metrics.jsonl goes on")
                return
            self._again = False
            self._run = self._replayed(reason)

    def _replayed(self, reason: str) -> Any:
        """A new offline run with every line of metrics.jsonl and samples.jsonl."""
        try:
            run = self._init("offline", secrets.token_hex(4))
            samples = {sample["step"]: sample for sample in _lines(self._folder / "samples.jsonl")}
            for metrics in _lines(self._folder / "metrics.jsonl"):
                self._log(run, metrics)
                if metrics["step"] in samples:
                    _log_sample(run, samples[metrics["step"]])
        except Exception as error:
            self._warn(f"{reason} and can't start offline ({error}); metrics.jsonl goes on")
            return None
        self._warn(f"{reason}; {self._folder}/wandb/offline-run-*-{run.id} has every step, `wandb sync` uploads it")
        return run


def _mode(key: bool, wrong: dict[str, str]) -> tuple[str, str]:
    """(W&B's mode, the reason if it is offline). What W&B itself would fail on is taken out of this process's
    environment."""
    if wrong:
        if BASE_URL in wrong:
            os.environ.pop(BASE_URL, None)
        if NETRC in wrong:
            os.environ[NETRC] = os.devnull
        online = key and BASE_URL not in wrong and os.environ.get("WANDB_MODE", "online") == "online"
        return "online" if online else "offline", f"W&B is offline: {'; '.join(wrong.values())}; "
    mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")
    return mode, "W&B is offline (no key, or WANDB_MODE says so); "


def _plain(value: Any) -> Any:
    """A dataclass as nested dictionaries with enums by name, which JSON and W&B can take."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def _log_sample(run: Any, sample: dict[str, Any]) -> None:
    text = f"<b>{escape(sample['prompt'])}</b>{escape(sample['text'])}"
    page = f'<!doctype html><meta charset="utf-8"><pre style="white-space:pre-wrap">{text}</pre>'
    _log_page(run, "samples/text", page, sample["step"])


def _log_page(run: Any, name: str, page: str, step: int) -> None:
    run.log({name: _page(page)}, step=step)


def _page(html: str) -> Any:
    import wandb

    # A model may write half a surrogate pair, which no file takes.
    return wandb.Html(html.encode("utf-8", errors="replace").decode(), inject=False, data_is_not_path=True)


def _end_service() -> None:
    """Ends W&B's service, which then writes what the run's file still lacks."""
    import wandb

    with contextlib.suppress(Exception):  # one that died can't be asked to
        wandb.teardown()


def _finish(run: Any) -> None:
    """Also waits for W&B's service to end: an offline run's file is whole only then."""
    import wandb

    run.finish()
    wandb.teardown()
