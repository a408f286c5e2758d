"""The wheel in an environment of its own and an empty folder: every command works without the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL

ROOT = Path(__file__).resolve().parents[2]
ONE_STEP = [one for one in SMALL if not one.startswith("model.")]
ONE_STEP += ["train.steps=1", "optim.warmup_steps=0", "engine=plain", "data.cache_dir=cache"]
PRESET = """mlp: sparse
hidden_size: 32
intermediate_size: 48
num_hidden_layers: 2
num_attention_heads: 2
num_key_value_heads: 1
vocab_size: 512
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="builds without a network: pip install hatchling")
    source = tmp_path_factory.mktemp("source")
    for name in ("moe", "configs"):  # without what lies about in a checkout
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    command = ["wheel", str(source), "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *command], check=True, timeout=200)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and this one's packages beneath it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "beneath.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return folder / "bin/python"


def test_it_holds_the_package_its_types_and_the_presets_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"moe/py.typed", "moe/api.py", "moe/configs/train.yaml", "moe/configs/model/small.yaml"} <= set(names)
    assert all(name.startswith(("moe/", "moe_train-")) for name in names)


def test_every_command_works_in_an_empty_folder(python: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def moe(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [str(python), "-m", "moe", *words],
            cwd=tmp_path,
            env=environment | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == code, f"{words}: {done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout

    where = subprocess.run(
        [str(python), "-c", "import moe; print(moe.__file__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(python.parents[1])), "the checkout's package is not the one tested"

    listed = moe("ls")
    assert "mixtral_8x7b" in listed
    moe("cp", "model/small", "mine.yaml")
    assert "hidden_size" in (tmp_path / "mine.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(PRESET)
    (tmp_path / "presets/model").mkdir(parents=True)
    (tmp_path / "presets/model/own.yaml").write_text(PRESET.replace("48", "56"))

    moe("train", "model=mine.yaml", *ONE_STEP, "run_dir=first")
    moe("train", "--config-dir", "presets", "model=own", *ONE_STEP, "run_dir=second")
    assert "intermediate_size: 48" in (tmp_path / "first/config.yaml").read_text()
    assert "intermediate_size: 56" in (tmp_path / "second/config.yaml").read_text()

    found = json.loads(moe("doctor", "--json"))
    assert found, "findings"
    assert moe("report", "first").strip() == "first/report.html"
    text = moe("generate", "checkpoint=first", "prompt=one two", "max_new_tokens=4", "device=cpu", "dtype=bfloat16")
    assert text.startswith("one two")
    moe("train", "model=no_such", code=2)
