"""launch/examples/numbers.sh and upcycle.sh as a reader runs them: rows, training, answers, the page. They must reach
their requirements; upcycle.sh does with a few steps."""

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


def installed_here(folder: Path, extras: str = "run") -> str:
    """A virtual environment, as launch/environment.sh leaves one, of the packages that these tests run with."""
    folder.mkdir()
    (folder / "bin").symlink_to(Path(sys.executable).parent)
    fingerprint = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()[:16]
    (folder / f".installed-{extras}-{fingerprint}").touch()
    return str(folder)


def page_of(script: Path, tmp_path: Path, extras: str = "run") -> str:
    """What the script writes as its page."""
    page = tmp_path / "page.md"
    more = {"VENV": installed_here(tmp_path / "venv", extras), "PAGE": str(page), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", str(script), str(tmp_path / "example")],
        env=environment(more),
        cwd=os.sep,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    return page.read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_numbers(tmp_path: Path) -> None:
    text = page_of(ROOT / "launch/examples/numbers.sh", tmp_path)
    assert "**no**" not in text
    assert len(re.findall(r"100\.00 % \(47 of 47\)", text)) == 6  # three seeds, in the bars and by seed


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_upcycle_with_few_steps(tmp_path: Path) -> None:
    whole = (ROOT / "launch/examples/upcycle.sh").read_text()
    short, count = re.subn(r"train\.steps=\d+", "train.steps=12", whole)
    short = short.replace("train.eval_every=15", "train.eval_every=6")
    short = short.replace('cd "$(dirname "$0")/../.."', f"cd {ROOT}")
    assert count == 3
    script = tmp_path / "upcycle.sh"
    script.write_text(short)
    text = page_of(script, tmp_path, "examples")
    missed = [line for line in text.splitlines() if "**no**" in line]
    assert all(line.startswith("| time") for line in missed), missed
    assert re.search(r"\| 16 of 16, (\d+) of \1 tokens \| yes", text)
