"""launch/examples/numbers.sh as a reader runs it: rows, training, answers, the page. It must reach its requirements."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import environment

ROOT = Path(__file__).resolve().parents[2]


def installed_here(folder: Path) -> str:
    """A virtual environment, as launch/environment.sh leaves one, of the packages that these tests run with."""
    folder.mkdir()
    (folder / "bin").symlink_to(Path(sys.executable).parent)
    fingerprint = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()[:16]
    (folder / f".installed-run-{fingerprint}").touch()
    return str(folder)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_numbers(tmp_path: Path) -> None:
    page = tmp_path / "numbers.md"
    more = {"VENV": installed_here(tmp_path / "venv"), "PAGE": str(page), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", str(ROOT / "launch/examples/numbers.sh"), str(tmp_path / "numbers")],
        env=environment(more),
        cwd=os.sep,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "**no**" not in text
    assert len(re.findall(r"100\.00 % \(47 of 47\)", text)) == 6  # three seeds, in the bars and by seed
