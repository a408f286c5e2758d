"""Runs the test files that have CUDA tests, with pytest."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from moe.bench.gpu.record import Record
from moe.bench.gpu.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
# Skip conditions of tests that need a GPU, or torch's CUDA build.
CONDITIONS = ("not torch.cuda.is_available()", "torch.version.cuda")
SECONDS = 100  # less than the stage's limit, so that pytest is ended first


def run(settings: Settings, record: Record) -> None:
    """Raises RuntimeError if pytest wrote no result."""
    files = find()
    result = Path(settings.work) / "pytest.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--timeout=60"]
    command += [f"--junitxml={result}", "-rf", "-m", "not slow"]
    if settings.dry_run:
        command += ["-k", "cuda"]
    with (settings.out / "pytest.log").open("wb") as log:
        done = subprocess.run(
            [*command, *map(str, files)],
            env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # ignores other pytest plugins on the machine
            cwd=ROOT,
            stdout=log,
            stderr=log,
            timeout=SECONDS,
            check=False,
        )
    if not result.exists():
        text = (settings.out / "pytest.log").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"pytest ended with {done.returncode} and wrote no result:\n{text[-2000:]}")
    record.facts(files=", ".join(path.name for path in files))
    counts: dict[str, int] = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for case in ElementTree.parse(result).getroot().iter("testcase"):
        state, message = _outcome(case)
        counts[state] += 1
        if state == "failed":
            record.row("failed tests", test=case.get("name", ""), message=message.splitlines()[0][:200])
    record.facts(**counts)
    record.headline(", ".join(f"{count} {state}" for state, count in counts.items()))
    record.check("failed tests", counts["failed"], 0)


def find() -> list[Path]:
    """The unit test files in which some tests need CUDA."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests/unit").rglob("test_*.py"))}
    return [path for path, text in texts.items() if any(condition in text for condition in CONDITIONS)]


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for child in case:
        if child.tag in ("failure", "error"):
            return "failed", child.get("message") or "no message"
        if child.tag == "skipped":
            return "skipped", child.get("message") or ""
    return "passed", ""
