"""A run's directory: one job at a time, and one model for its whole life."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from pathlib import Path
from typing import IO

from moe.checkpoint.layout import CONFIG
from moe.config import Config, Schedule
from moe.config.compose import read_config
from moe.errors import UserError

# What a checkpoint's tensors and token ids depend on: with another value the run can't continue.
FIXED = ("model", "router.kind", "router.num_experts", "tokenizer")
# These change how the run is computed, split, watched or stored, not its mathematics. Data is compared by fingerprint.
NEUTRAL = (
    "run_dir", "engine", "check_memory", "tracking", "checkpoint", "parallel", "experts.backend", "model.attention",
    "model.recompute", "data.cache_dir", "data.path", "data.format", "data.text_field", "train.eval_every",
    "train.eval_sequences", "train.sample_every", "train.sample_prompt", "train.sample_tokens", "train.log_every",
    "train.peak_tflops", "alarm", "guard.max_skipped", "guard.hang_seconds", "guard.name_stragglers",
)  # fmt: skip


class RunLock:
    """Holds a run directory: one job at a time. Raises UserError if another job holds it, or `.lock` is no file."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._path = run_dir, run_dir / ".lock"
        run_dir.mkdir(parents=True, exist_ok=True)
        while True:
            self._file = self._open()
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = _read_soon(self._file)
                self._file.close()
                raise UserError(
                    f"run_dir={run_dir} is in use by {holder}: wait for it, stop it, or choose another run_dir"
                ) from error
            if self._is_in_place():
                break
            self._file.close()  # another file took its place before it was locked
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        self._file.flush()

    def _open(self) -> IO[str]:
        # A link's target must not be written, and a FIFO's other end not waited for.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(self._path, flags, 0o644)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise
            raise UserError(f"{self._path}: must be a plain file, not a link or directory: remove it") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UserError(f"{self._path}: must be a plain file: remove it")
        return open(descriptor, "a+", encoding="utf-8")

    def _is_in_place(self) -> bool:
        try:
            found = self._path.lstat()
        except OSError:
            return False
        mine = os.fstat(self._file.fileno())
        return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)

    def check(self, step: int) -> None:
        """Raises OSError when the directory was removed, renamed or replaced since it was locked."""
        if not self._is_in_place():
            raise OSError(
                f"step {step}: run_dir={self._run_dir} was removed, renamed or replaced while this run wrote it: "
                "nothing more is written there; bring the directory back and run the same command to go on from its "
                "newest checkpoint"
            )

    def close(self) -> None:
        self._file.close()


def _read_soon(file: IO[str]) -> str:
    """The line that names the holder, who writes it a moment after locking."""
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        file.seek(0)
        if text := file.read().strip():
            return text
        time.sleep(0.01)
    return "an unknown process"


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """A configuration as {dotted key: leaf}."""
    names = getattr(value, "__dataclass_fields__", None)
    items = [(name, getattr(value, name)) for name in names] if names else None
    if items is None and isinstance(value, dict):
        items = list(value.items())
    if items is None:
        return {prefix: getattr(value, "name", value)}
    flat: dict[str, object] = {}
    for name, item in items:
        flat |= flatten(item, f"{prefix}.{name}" if prefix else str(name))
    return flat


def differences(old: Config, new: Config) -> dict[str, tuple[object, object]]:
    """{key: (old value, new value)} where they differ."""
    before, after = flatten(old), flatten(new)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def model_differences(old: Config, new: Config) -> dict[str, tuple[object, object]]:
    """{key: (old value, new value)} where the models differ in more than how they are computed."""
    changed = differences(old, new).items()
    return {key: values for key, values in changed if _under(key, ("model", "router")) and not _under(key, NEUTRAL)}


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def check_resumable(checkpoint: Path, config: Config, data: tuple[str, str]) -> list[str]:
    """Lines that tell what changed since `checkpoint`; `data` is the fingerprint of its data and of today's.

    Raises UserError for what can't change, and for what changes the mathematics unless `checkpoint.allow_changes`.
    """
    changed = differences(read_config(checkpoint / CONFIG), config)
    lines = [f"{key}: {old} → {new}" for key, (old, new) in changed.items()]
    # Another number of steps changes the learning rates, except where they depend on the step alone.
    flat = config.optim.schedule is Schedule.constant and config.optim.warmup_steps is not None
    harmless = (*NEUTRAL, "train.steps") if flat else NEUTRAL
    mathematics = []
    for (key, (old, new)), line in zip(changed.items(), lines, strict=True):
        if _under(key, NEUTRAL):
            continue
        if _under(key, FIXED):
            raise UserError(
                f"{key}={new}, but the checkpoint {checkpoint} was written with {key}={old}: "
                "set it back, or start another run with run_dir=…"
            )
        if not _under(key, harmless):
            mathematics.append(line)
    if data[0] != data[1]:
        lines.append(f"the data's fingerprint: {data[0][:12]} → {data[1][:12]}")
        mathematics.append(lines[-1])
    if mathematics and not config.checkpoint.allow_changes:
        raise UserError(
            f"since {checkpoint} this changed, and with it the mathematics of the run: {'; '.join(mathematics)}; "
            "checkpoint.allow_changes=true goes on with it, run_dir=… starts another run"
        )
    return lines
