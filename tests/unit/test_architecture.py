"""Which room may import which (docs/architecture.md), compared with the code's imports and with what they load."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "moe"
FILES = sorted(PACKAGE.rglob("*.py"))
# Each room (a folder of moe/, or a file beside them) and exactly the rooms that it imports. Nothing imports upwards: a
# room imports only rooms listed above it.
ROOMS: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "untrusted": {"errors"},
    "durable": {"untrusted", "errors"},
    "locks": {"errors"},
    "cgroups": set(),
    "cores": {"cgroups"},
    "config": {"untrusted", "errors"},
    "distributed": {"cores", "errors"},
    "kernels": {"config", "errors"},
    "sparse": {"kernels", "config", "errors"},
    "model": {"kernels", "sparse", "config", "cores"},
    "adapters": {"kernels", "sparse", "model", "config", "errors"},
    "engine": {"distributed", "sparse", "config", "errors"},
    "plan": {"kernels", "config", "cgroups", "errors"},
    "checkpoint": {
        "plan", "engine", "distributed", "adapters", "model", "sparse", "config", "errors", "untrusted", "durable",
        "__init__",
    },
    "data": {"config", "cores", "errors", "untrusted", "durable"},
    "inference": {"model", "sparse", "kernels", "data", "config", "errors"},
    "interop": {"plan", "data", "checkpoint", "adapters", "model", "config", "untrusted", "durable", "errors"},
    "evaluate": {
        "inference", "data", "checkpoint", "distributed", "model", "sparse", "kernels", "config", "untrusted",
        "durable", "errors", "__init__",
    },
    "report": {"config", "errors", "untrusted", "durable", "__init__"},
    "validate": {"report", "plan", "data", "config", "durable", "errors", "__init__"},
    "train": {
        "report", "interop", "inference", "plan", "data", "checkpoint", "engine", "adapters", "model", "sparse",
        "kernels", "distributed", "config", "durable", "locks", "untrusted", "errors",
    },
    "sweep": {"train", "report", "distributed", "config", "cores", "durable", "locks", "untrusted", "errors"},
    "bench": {
        "report", "train", "inference", "plan", "data", "checkpoint", "engine", "model", "sparse", "kernels",
        "distributed", "config", "cores", "durable", "untrusted", "errors",
    },
    "analysis": {
        "report", "model", "sparse", "data", "checkpoint", "config", "errors", "durable", "__init__",
    },
    "doctor": {"bench", "train", "plan", "kernels", "distributed", "config", "cores", "errors"},
    "cli": {
        "doctor", "bench", "analysis", "sweep", "train", "validate", "report", "evaluate", "interop", "inference",
        "plan", "data", "checkpoint", "distributed", "kernels", "config", "errors",
    },
    "__main__": {"cli"},
    "api": {"inference", "data", "checkpoint", "model", "sparse", "kernels", "config", "errors"},
}  # fmt: skip
# Packages that only these files may import.
ONLY_IN = {
    "deepspeed": "engine/deepspeed/",
    "wandb": "train/wandb_run.py",
    "hydra": "config/",
    "datasets": "data/",
    "megablocks": "kernels/megablocks.py",
    "triton": "kernels/fused/",
    "optuna": "sweep/",
    "lm_eval": "evaluate/",
}
# Packages that importing a room must not load, not even indirectly.
NEVER_LOADED = {
    "kernels": {"hydra", "deepspeed", "wandb", "datasets", "transformers", "triton"},
    "sparse": {"hydra", "deepspeed", "wandb", "datasets", "transformers", "triton"},
    "model": {"hydra", "deepspeed", "wandb", "datasets", "transformers", "triton"},
    "plan": {"hydra", "deepspeed", "wandb", "datasets", "transformers"},
    "report": {"hydra", "deepspeed", "wandb", "datasets", "transformers", "torch"},
    "sweep": {"deepspeed", "wandb", "datasets", "transformers", "torch"},
    "cli": {"deepspeed", "wandb", "datasets", "transformers", "torch", "optuna", "lm_eval"},
}


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def _imports(path: Path) -> frozenset[str]:
    """Dotted names that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            bare = node.module == "moe"
            names |= {f"moe.{alias.name}" for alias in node.names} if bare else {node.module}
    return frozenset(names)


def _rooms_imported(path: Path) -> Iterator[str]:
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "moe" and len(parts) > 1:
            yield "__init__" if parts[1] == "__version__" else parts[1]


def test_every_room_is_listed_and_there() -> None:
    assert {_room(path) for path in FILES} == ROOMS.keys()


def test_rooms_import_what_the_table_says() -> None:
    found: dict[str, set[str]] = {room: set() for room in ROOMS}
    for path in FILES:
        found[_room(path)] |= set(_rooms_imported(path)) - {_room(path)}
    assert found == ROOMS


def test_nothing_imports_upwards() -> None:
    order = list(ROOMS)
    for room, below in ROOMS.items():
        assert all(order.index(other) < order.index(room) for other in below), f"{room} imports a room under its line"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_packages_stay_where_they_belong(path: Path) -> None:
    for name in _imports(path):
        place = ONLY_IN.get(name.split(".")[0])
        assert place is None or str(path.relative_to(PACKAGE)).startswith(place), f"{path} imports {name}"


LOADER = """
import importlib, json, os, sys
for room, modules in json.loads(sys.argv[1]).items():
    reader, writer = os.pipe()
    if os.fork() == 0:
        for module in modules:
            importlib.import_module(module)
        os.write(writer, json.dumps(sorted({name.partition(".")[0] for name in sys.modules})).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        print(json.dumps([room, json.load(pipe)]))
    os.wait()
"""


def test_what_a_room_loads_stays_small() -> None:
    """Imports each room in a fresh process, so that indirect imports count too."""
    modules: dict[str, list[str]] = {}
    for path in FILES:
        if _room(path) in NEVER_LOADED and "kernels/fused/" not in str(path):  # imported only on CUDA, with triton
            dotted = ".".join(("moe", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
            modules.setdefault(_room(path), []).append(dotted)
    done = subprocess.run(
        [sys.executable, "-c", LOADER, json.dumps(modules)], capture_output=True, text=True, check=True, timeout=200
    )
    loaded = dict(json.loads(line) for line in done.stdout.splitlines())
    assert loaded.keys() == modules.keys()
    for room, packages in loaded.items():
        assert not NEVER_LOADED[room] & set(packages), f"importing moe.{room} loads them"


def test_class_names_are_unique() -> None:
    seen: dict[str, Path] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                assert node.name not in seen, f"class {node.name} is in {path} and in {seen[node.name]}"
                seen[node.name] = path


TESTS = Path(__file__).resolve().parent
OUTSIDE = {"data_examples": PACKAGE.parent / "data" / "examples"}  # rooms that aren't the package's
ABOUT_SEVERAL = {  # room → tests of more than one of its modules
    "bench": {"gpu"},
    "config": {"presets"},
    "data_examples": {"rows"},
    "kernels": {"cuda_fake", "devices", "largest_tensor"},
    "model": {"recompute"},
    "sparse/routers": {"published"},
}


def test_a_modules_test_is_where_its_name_says() -> None:
    for path in TESTS.rglob("test_*.py"):
        room = path.parent.relative_to(TESTS)
        name = path.stem.removeprefix("test_")
        if room.parts and name not in ABOUT_SEVERAL.get(str(room), ()):
            module = OUTSIDE.get(str(room), PACKAGE / room) / name
            assert module.is_dir() or module.with_suffix(".py").is_file(), f"{path}: there is no {module}.py"
