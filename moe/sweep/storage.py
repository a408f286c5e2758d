"""Where a study is kept: a journal file, SQLite or PostgreSQL, opened with one line about what is wrong."""

from __future__ import annotations

import fcntl
import os
import random
import re
import time
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalStorage

from moe.errors import UserError, line_about

JOURNAL = "study.journal"
ATTEMPTS = 5
BEAT_SECONDS, GRACE_SECONDS = 10, 60  # of Optuna's heartbeat: a trial without one for so long was lost


class _FileLock:
    """Optuna's lock of the journal. Unlike its own ones it ends with the process, also by `kill -9`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def acquire(self) -> bool:
        self._file = self._path.open("ab")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        assert self._file is not None
        self._file.close()


def open_storage(stated: str | None, folder: Path) -> BaseStorage:
    """Raises UserError, one line without the password, when it can't be reached."""
    if stated is None:
        return _open_journal(folder / JOURNAL)
    if not re.match(r"(sqlite|postgresql)(\+\w+)?://", stated):
        raise UserError(
            f"sweep.storage={masked(stated)} must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE; left "
            "out it is a journal file in run_dir"
        )
    # NOTE: SQLAlchemy opens connections when they are needed; pre_ping notices one that a restarted server has dropped.
    options: dict[str, Any] = {"pool_pre_ping": True}
    if stated.startswith("postgresql"):
        options["connect_args"] = {"connect_timeout": 10}
    try:
        return _open_database(_with_driver(stated), options)
    except ImportError as error:
        raise UserError(
            f"sweep.storage={masked(stated)} needs psycopg 3: pip install 'moe-train[postgresql]' ({error})"
        ) from error
    except Exception as error:
        if not is_unreachable(error):
            raise
        raise UserError(f"sweep.storage={masked(stated)} can't be reached: {first_line(error)}") from error


def _open_database(url: str, options: dict[str, Any]) -> RDBStorage:
    """Tries again where another command made Optuna's tables at the same moment."""
    for attempt in range(ATTEMPTS):
        try:
            return RDBStorage(
                url, engine_kwargs=options, heartbeat_interval=BEAT_SECONDS, grace_period=GRACE_SECONDS
            )  # fmt: skip
        except Exception as error:
            if attempt == ATTEMPTS - 1 or not re.search("already exists|duplicate key", str(error)):
                raise
            time.sleep(1 + random.random())
    raise AssertionError


def _with_driver(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://", 1)


def _open_journal(path: Path) -> JournalStorage:
    lock = _FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire()
        try:
            _cut_torn_line(path)
        finally:
            lock.release()
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise UserError(f"{path}: not a journal of Optuna ({error}); restore it, or choose another run_dir") from error
    except OSError as error:
        raise UserError(f"{path}: {line_about(error)}") from error


def _cut_torn_line(path: Path) -> None:
    """Removes what a power cut left of a last line; what it said happens again."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def masked(url: str) -> str:
    """The storage's address without its password."""
    return re.sub(r"(://[^:@/]*):[^@]*@", r"\1:***@", url)


def first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    text = str(getattr(cause, "orig", None) or cause).strip() or type(cause).__name__
    return masked(text.splitlines()[0])


def is_unreachable(error: BaseException) -> bool:
    """Whether Optuna or SQLAlchemy raised it because the storage doesn't answer."""
    if isinstance(error, optuna.exceptions.StorageInternalError):
        return True
    return any(kind.__module__.startswith("sqlalchemy.exc") for kind in type(error).__mro__)


def beat(storage: BaseStorage, trial_id: int) -> None:
    """Tells the other machines that this trial is being trained."""
    if isinstance(storage, RDBStorage):
        storage.record_heartbeat(trial_id)


def without_heartbeat(storage: BaseStorage, study_id: int) -> set[int] | None:
    """Ids of the running trials that no machine has told of for GRACE_SECONDS; None for a journal, which has none."""
    if not isinstance(storage, RDBStorage):
        return None
    return set(storage._get_stale_trial_ids(study_id))
