"""Where metrics go: always RUN_DIR/metrics.jsonl, and W&B. The only file that imports wandb.

W&B must never cost a training run: no key or no network means offline (sync later with `wandb sync`). Its service is a
process of its own, which keeps the newest 32 KiB in memory: if it dies, an offline run is started in its place and
gets every metric again from metrics.jsonl. A second failure ends W&B's part; each is one warning.
"""

from __future__ import annotations

import contextlib
import json
import math
import netrc
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moe.config import Config, TrackingBackend
from moe.durable import append_line, write_durably
from moe.errors import UserError
from moe.untrusted import Values, json_lines, read_text

# W&B section → metrics; sections are shown in alphabetical order. A metric that no section lists is a router's
# and belongs to "balance", which comes first.
PANELS = {
    "train": ("loss", "lm_loss", "grad_norm", "lr", "dropped_fraction", "tokens"),
    "speed": ("tokens_per_second", "step_seconds", "mfu", "straggler_seconds"),
    "val": ("val_loss", "val_bits_per_byte", "val_unigram_entropy"),
}
UNSHOWN = ("step", "skipped_steps", "slowest_rank")


def plain(value: Any) -> Any:
    """A dataclass as nested dictionaries with enums by name, which JSON and W&B can take."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def finite(value: Any) -> Any:
    """Metrics with None for NaN and infinities, which JSON doesn't have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value


def cut_back(path: Path, step: int) -> None:
    """Keep the lines of metrics.jsonl (or samples.jsonl) up to `step`: a resume writes the later ones again.

    Also drops lines that a crash has torn, wherever they are. Raises UserError for a line whose step is no number.
    """
    if not path.exists():
        return
    kept = []
    for line in json_lines(path):
        if line.value is not None:
            values = Values(line.value, f"{path}:{line.number}", "remove the line")
            if values.count("step") <= step:
                kept.append(line.raw.rstrip(b"\n") + b"\n")
    write_durably(path, b"".join(kept))


def has_key() -> bool:
    """Whether W&B would find an API key on this machine; no server is asked."""
    try:
        host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    except ValueError:  # W&B itself says so
        host = ""
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        known = None
    return bool(os.environ.get("WANDB_API_KEY") or known)


def panels(metrics: dict[str, Any]) -> dict[str, Any]:
    """A step's metrics under W&B's sections, the routers' losses per layer beside their means; no nulls."""
    section_of = {name: section for section, names in PANELS.items() for name in names}
    shown: dict[str, Any] = {}
    for name, value in metrics.items():
        if name.endswith("_layers"):
            base = f"balance/{name.removesuffix('_layers')}_layer"
            shown |= {f"{base}_{layer:02d}": one for layer, one in enumerate(value)}
        elif isinstance(value, int | float) and name not in UNSHOWN:
            shown[f"{section_of.get(name, 'balance')}/{name}"] = value
    for layer, shares in enumerate(metrics["expert_shares"]):
        for expert, share in enumerate(shares):
            shown[f"experts/layer_{layer:02d}/share_{expert:02d}"] = share
    for name, value in metrics.get("val_loss_by_source", {}).items():
        shown[f"val/loss_{name}"] = value
    return {name: value for name, value in shown.items() if value is not None}


class Tracker:
    """Rank 0's writer. `log` takes the step's metrics."""

    def __init__(self, config: Config, run_dir: Path, *, resumed: bool, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._run, self._again = None, True
        self._config, self._folder = config, run_dir
        if config.tracking.backend is TrackingBackend.wandb:
            self._run = self._start(run_dir, resumed)

    def _init(self, mode: str, run_id: str) -> Any:
        import wandb

        return wandb.init(
            project=self._config.tracking.project,
            name=self._config.tracking.name or self._folder.name,
            id=run_id,
            resume="allow" if mode == "online" else None,
            config=plain(asdict(self._config)),
            dir=str(self._folder),
            mode=mode,  # type: ignore[arg-type]  # what the user put into WANDB_MODE is wandb's to judge
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", "15"))
            ),
        )

    def _start(self, run_dir: Path, resumed: bool) -> Any:
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        identity = run_dir / "wandb_id"
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
            except Exception as error:  # its own errors, its service's, the network's: none may cost the run
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                failed += f"W&B can't start in mode {attempt} ({reason}); "
                continue
            if attempt == "offline":
                why = failed or "W&B is offline (no key, or WANDB_MODE says so); "
                self._warn(f"{why}`wandb sync {run_dir}/wandb/offline-run-*-{attempt_id}` uploads the run later")
            return run
        self._warn(f"{failed}metrics.jsonl has every metric")
        return None

    def log(self, metrics: dict[str, Any]) -> None:
        """One JSON line, null for what is not finite; the same to W&B under its sections, without the nulls, the
        load-balancing loss per layer beside the total."""
        metrics = finite(metrics)
        try:
            append_line(self._folder / "metrics.jsonl", json.dumps(metrics, allow_nan=False) + "\n")
        except OSError as error:  # a full disk costs metrics, not the run
            self._warn(
                f"{error.filename}: the metrics of step {metrics['step']} could not be written ({error.strerror})"
            )
        if self._run is not None:
            self._guarded(lambda run: run.log(panels(metrics), step=metrics["step"]))

    def _guarded(self, action: Callable[[Any], object]) -> None:
        """Calls `action` with the W&B run. After one failure an offline run replaces it; after two, W&B is off."""
        try:
            action(self._run)
        except Exception as error:  # whatever it is, it must not cost the run
            self._run = None
            reason = f"W&B stopped ({type(error).__name__}: {error})"
            _end_service()
            if not self._again:
                self._warn(f"{reason}; metrics.jsonl goes on")
                return
            self._again = False
            self._run = self._replayed(reason)

    def _replayed(self, reason: str) -> Any:
        """A new offline run with every line of metrics.jsonl."""
        try:
            run = self._init("offline", secrets.token_hex(4))
            for line in json_lines(self._folder / "metrics.jsonl"):
                if line.value is not None:
                    run.log(panels(line.value), step=line.value["step"])
        except Exception as error:
            self._warn(f"{reason} and can't start offline ({error}); metrics.jsonl goes on")
            return None
        self._warn(f"{reason}; {self._folder}/wandb/offline-run-*-{run.id} has every step, `wandb sync` uploads it")
        return run

    def close(self) -> None:
        finished = None
        while self._run is not finished:  # if it fails here, another has replaced it
            finished = self._run
            self._guarded(_finish)


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
