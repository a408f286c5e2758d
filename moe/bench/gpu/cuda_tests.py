"""The test files that have CUDA tests, by pytest."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from moe.bench.gpu.record import Record
from moe.bench.gpu.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
# Conditions of tests that are skipped without a GPU, or without torch's CUDA build.
CONDITIONS = ("not torch.cuda.is_available()", "torch.version.cuda")
SECONDS = 100  # within the stage's limit, so that a hanging test still leaves a count


def run(settings: Settings, record: Record) -> None:
    """Raises RuntimeError where pytest wrote no result."""
    files = find()
    result = Path(settings.work) / "pytest.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--timeout=60"]
    command += [f"--junitxml={result}", "-rf", "-m", "not slow"]
    if settings.dry_run:
        command += ["-k", "cuda"]
    with (settings.out / "pytest.log").open("wb") as log:
        done = subprocess.run(
            [*command, *map(str, files)],
            env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # whatever else the machine has installed
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
    """The unit test files of which some tests need CUDA."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests/unit").rglob("test_*.py"))}
    return [path for path, text in texts.items() if any(condition in text for condition in CONDITIONS)]


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for child in case:
        if child.tag in ("failure", "error"):
            return "failed", child.get("message") or "no message"
        if child.tag == "skipped":
            return "skipped", child.get("message") or ""
    return "passed", ""
