"""The tasks of a command: found by name among the user's own and the harness's, and read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks import TaskManager

from moe.config import EvaluateConfig
from moe.config.rules import require
from moe.config.suggest import closest
from moe.errors import UserError
from moe.untrusted import read_text

SHOWN = 20  # names in a message
YAML = (".yaml", ".yml")


def load_tasks(config: EvaluateConfig) -> Any:
    """What `lm_eval.evaluator.evaluate` takes. The harness's thousands of tasks are only listed if a name isn't among
    the user's own. Raises UserError."""
    files = _stated_files(config)
    own = _own_manager(config)
    names = [name for name in config.task_names if name not in files]
    manager = own if all(name in own.task_index for name in names) else _all_tasks(config)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        raise UserError(_unknown(unknown[0], config, own, manager))
    specs = [files.get(name, name) for name in config.task_names]
    try:
        loaded = manager.load(specs)
    except UserError as error:
        raise UserError(f"tasks={config.tasks}: {error}") from error
    except Exception as error:  # of a task that isn't what the harness takes
        absent = " (a split, column or key that isn't there)" if isinstance(error, KeyError) else ""
        raise UserError(f"tasks={config.tasks}: the harness can't use the task: {_said(error)}{absent}") from error
    for name, task in loaded["tasks"].items():
        if config.num_fewshot is not None and task.get_config("num_fewshot") != 0:  # 0 there means: never
            task.set_config("num_fewshot", config.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(config.fewshot_random_seed)
        require(
            not getattr(task, "UNSAFE_CODE", False) or config.confirm_run_unsafe_code,
            f"task {name}: runs code that the model writes; confirm_run_unsafe_code=true does",
        )
        require(not getattr(task, "MULTIMODAL", False), f"task {name}: has images or sound, and the model reads text")
    return loaded


def _stated_files(config: EvaluateConfig) -> dict[str, str]:
    """{name in `tasks`: the YAML file that it is, or that `include_path` is}."""
    files = {name: name for name in config.task_names if name.endswith(YAML)}
    for name in files:
        require(Path(name).is_file(), f"tasks={config.tasks}: {name}: no such file")
    if config.include_path is not None:
        path = Path(config.include_path).expanduser()
        require(path.exists(), f"include_path={path}: no such folder or file")
        if path.is_file():
            task = _read(path)
            files |= {str(task[key]): str(path) for key in ("task", "group") if isinstance(task.get(key), str)}
    for path in {*files.values()}:
        _read(Path(path))
    return files


def _own_manager(config: EvaluateConfig) -> TaskManager:
    folder = None if config.include_path is None else Path(config.include_path).expanduser()
    return TaskManager(include_defaults=False, include_path=folder if folder and folder.is_dir() else None)


def _all_tasks(config: EvaluateConfig) -> TaskManager:
    print("reading the list of the harness's own tasks, which takes some seconds", file=sys.stderr)
    return TaskManager(include_path=config.include_path)


def _unknown(name: str, config: EvaluateConfig, own: TaskManager, manager: TaskManager) -> str:
    near = closest(name, own.all_tasks) or closest(name, manager.all_tasks)
    text = f"tasks={config.tasks}: no task {name}" + (f"; did you mean {near}?" if near else "")
    if config.include_path is None:
        return f"{text} (include_path=FOLDER adds tasks of your own)" if not near else text
    there = ", ".join(own.all_tasks[:SHOWN]) or "no task"
    folder = Path(config.include_path).expanduser()
    for path in sorted(folder.rglob("*.yaml")) if folder.is_dir() else ():
        _read(path)
    return f"{text} {folder} has {there}"


class _Loader(yaml.SafeLoader):
    """YAML in which `!function NAME` is text: what tasks are named doesn't need it."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))  # pyright: ignore


def _read(path: Path) -> dict[str, Any]:
    """A task's file. Raises UserError naming it, and the line, if it isn't a YAML mapping."""
    try:
        content = yaml.load(read_text(path), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML ({error.problem})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML ({_said(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must have a task's keys, such as task, dataset_path and output_type")
    return content


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
