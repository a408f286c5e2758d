"""Refuses what a task's files must not have the harness run or read; messages for what isn't there.

A task is a YAML file. The harness imports the Python that it names (`!function`), renders its templates in a Jinja
without a sandbox, and gets metrics and data sets that it doesn't know from the Hub. These four attributes of lm_eval
are replaced while tasks are loaded and run, after a check that each exists.
"""

from __future__ import annotations

import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub.constants
import lm_eval
import lm_eval.api.task
import lm_eval.tasks._yaml_loader
import lm_eval.utils
from jinja2.sandbox import SandboxedEnvironment

from moe.errors import UserError, line_about

OWN_FOLDER = Path(lm_eval.__file__).resolve().parent
BORROWED = (
    (lm_eval.tasks._yaml_loader, "_import_func_in_yml"),
    (lm_eval.utils, "env"),
    (lm_eval.api.task, "get_metric"),
    (lm_eval.api.task, "datasets"),
)
READERS = ("json", "csv", "parquet", "arrow", "text")  # of `datasets`, for local files; some others unpickle
CONNECT_SECONDS = 5.0
TRUST = "trust_task_code=true runs it, as your own code"


@contextmanager
def guarded(trust_task_code: bool) -> Iterator[None]:
    """Inside, code that comes with a task of the user's own is refused with UserError unless it is trusted; the
    harness's own tasks may run theirs."""
    missing = [f"{module.__name__}.{name}" for module, name in BORROWED if not hasattr(module, name)]
    if missing:
        raise UserError(
            f"lm_eval {getattr(lm_eval, '__version__', '')}: has no {missing[0]}, which keeps a task's files from "
            "running code: pip install 'lm_eval>=0.4.13,<0.5'"
        )
    before = [(module, name, getattr(module, name)) for module, name in BORROWED]
    import_function, env, get_metric, datasets = (value for _, _, value in before)
    inside = [import_function, env, get_metric, _Datasets(datasets, trust_task_code)]
    if not trust_task_code:
        inside[:3] = [_imports_own(import_function), _sandboxed(env), _known_metrics(get_metric)]
    try:
        for (module, name, _), value in zip(before, inside, strict=True):
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _imports_own(import_function: Callable[[str, Path], Any]) -> Callable[[str, Path], Any]:
    def imported(qual: str, base_dir: Path) -> Any:
        if OWN_FOLDER not in Path(base_dir).resolve().parents:
            raise UserError(f"{base_dir}: a task names Python code there, !function {qual}; {TRUST}")
        return import_function(qual, base_dir)

    return imported


def _sandboxed(env: Any) -> SandboxedEnvironment:
    sandbox = SandboxedEnvironment(undefined=env.undefined, keep_trailing_newline=env.keep_trailing_newline)
    sandbox.filters = env.filters
    return sandbox


def _known_metrics(get_metric: Callable[..., Any]) -> Callable[..., Any]:
    def known(name: str, hf_evaluate_metric: bool = False) -> Any:
        from lm_eval.api.registry import metric_registry

        if hf_evaluate_metric or name not in metric_registry:
            raise UserError(f"metric {name}: would be Python code from the Hugging Face Hub; {TRUST}")
        return get_metric(name)

    return known


class _Datasets(ModuleType):
    """`datasets` for the harness's tasks: local files by known readers, with a line where one isn't there."""

    def __init__(self, datasets: ModuleType, trusted: bool) -> None:
        super().__init__("datasets")
        self._datasets, self._trusted = datasets, trusted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._datasets, name)

    def load_dataset(self, path: str | None = None, name: str | None = None, **kwargs: Any) -> Any:
        if path is None:
            raise UserError("dataset_path is missing: for local files write `dataset_path: json`, and data_files")
        files = kwargs.get("data_files")
        if path not in READERS and not self._trusted and files is not None and "/" not in path:
            raise UserError(f"dataset_path={path}: must be {', '.join(READERS[:-1])} or {READERS[-1]} for local files")
        for file in _texts(files):
            if "://" not in file and not any(sign in file for sign in "*?[") and not Path(file).is_file():
                raise UserError(f"data_files={file}: no such file; a task's paths are relative to {Path.cwd()}")
        on_hub = files is None and path not in READERS and not Path(path).exists()
        if on_hub:
            self._use_cache_where_unreachable()
        try:
            return self._datasets.load_dataset(path, name, **kwargs)
        except (OSError, ValueError, ImportError) as error:
            if on_hub:
                raise UserError(
                    f"dataset_path={path}: not read from the Hugging Face Hub ({_first(error)}): is the name right, "
                    "and the network there? Local files: `dataset_path: json`, and data_files"
                ) from error
            raise UserError(f"dataset_path={path}: {_first(error)}") from error

    def _use_cache_where_unreachable(self) -> None:
        """Without a network, data sets come from the cache or fail at once, instead of after a minute of retries."""
        host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
        if urllib.request.getproxies() or host.hostname is None:
            return
        try:
            socket.create_connection((host.hostname, host.port or 443), timeout=CONNECT_SECONDS).close()
        except OSError:
            self._datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(line_about(error).split())[:300]}"
