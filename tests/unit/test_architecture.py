"""Who may import whom (docs/architecture.md), held against the code's own imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "moe"
BELOW_TRAINING = {
    "config", "errors", "durable", "kernels", "sparse", "model", "distributed", "engine", "checkpoint", "data", "plan",
    "inference", "report",
}  # fmt: skip
ALLOWED = {
    "errors": set(),
    "durable": set(),
    "config": {"errors"},
    "distributed": {"errors"},
    "kernels": {"config", "errors"},
    "sparse": {"kernels", "config", "errors"},
    "model": {"kernels", "sparse", "config", "errors"},
    "engine": {"distributed", "sparse", "config", "errors"},
    "checkpoint": {"engine", "distributed", "model", "config", "errors", "durable"},
    "data": {"config", "errors", "durable"},
    "plan": {"kernels", "model", "sparse", "config", "errors"},
    "inference": {"model", "data", "config", "errors"},
    "report": {"errors"},
    "train": BELOW_TRAINING,
    "bench": BELOW_TRAINING | {"train"},
    "cli": BELOW_TRAINING | {"train", "bench"},
    "__main__": {"cli"},
    "__init__": set(),
}
ONLY_IN = {
    "deepspeed": {"engine/deepspeed/engine.py", "engine/deepspeed/optimizer_state.py"},
    "wandb": {"train/tracking.py"},
    "hydra": {"config/compose.py"},
    "megablocks": {"kernels/megablocks.py"},
}


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "moe" else {node.module or ""}
            )
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "moe" and len(parts) > 1 and parts[1] != room and parts[1] != "__version__":
            assert parts[1] in ALLOWED[room], f"{path}: {room} may not import moe.{parts[1]}"
        if parts[0] in ONLY_IN:
            assert str(path.relative_to(PACKAGE)) in ONLY_IN[parts[0]], (
                f"{path}: {parts[0]} belongs to {ONLY_IN[parts[0]]}"
            )
        if room in ("kernels", "model", "sparse"):
            assert parts[0] not in ("hydra", "omegaconf", "wandb", "deepspeed"), f"{path} imports {name}"


def test_every_room_is_listed() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms <= ALLOWED.keys()
