"""Wrong commands and data: one line that names what to change, exit code 2, no traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from moe.cli import main as cli
from tests.e2e.conftest import SMALL, Run


def _main(overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, stderr) of `moe OVERRIDES`, in this process."""
    monkeypatch.setattr(sys, "argv", ["moe", *overrides])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    code = caught.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().err


def _files(folder: Path) -> dict[str, list[str]]:
    """Writes bad input files; returns, by name, the overrides that use them."""
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin.txt").write_bytes("caf\u00e9 ".encode("latin-1") * 3)
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": "torn\n')
    (folder / "other.jsonl").write_text('{"body": "a"}\n')
    (folder / "short").mkdir()
    for name in ("one", "two", "three"):
        (folder / "short" / f"{name}.txt").write_text(f"{name} is too short for the sequences\n" * 12)
    data = "data=files"
    return {
        "empty": [data, f"data.path={folder / 'empty.txt'}"],
        "latin": [data, f"data.path={folder / 'latin.txt'}"],
        "broken": [data, f"data.path={folder / 'broken.jsonl'}"],
        "field": [data, f"data.path={folder / 'other.jsonl'}"],
        "absent": [data, f"data.path={folder / 'nothing*.txt'}"],
        "short": [data, f"data.path={folder / 'short'}", "tokenizer.vocab_size=300"],
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("empty", "empty.txt"),
        ("latin", "latin.txt: byte 3"),
        ("broken", "broken.jsonl:2"),
        ("field", "other.jsonl:1"),
        ("absent", "nothing*.txt"),
    ],
)
def test_bad_data_is_one_line(
    name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["prepare", *_files(tmp_path)[name], f"data.cache_dir={tmp_path / 'cache'}"]
    code, error = _main(overrides, monkeypatch, capsys)
    assert code == 2
    assert error.startswith("moe: ")
    assert len(error.splitlines()) == 1
    assert expected in error


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train", "router.top_k=9"], "router.top_k=9 must be ≤ router.num_experts=8"),
        (["train", "router.topk=1"], "router.topk=1: no such key; did you mean router.top_k=1?"),
        (["train", "parallel.expert=2"], "parallel.expert is now parallel.expert_parallel_size"),
        (["train", "experts=loop"], "experts=loop: write experts.backend=loop"),
        (["plan", "hardware=h100_8x2"], "hardware=h100_8x2: write hardware=h100 hardware.nodes=2"),
        (
            ["train", "parallel.expert_parallel_size=2"],
            "parallel.expert_parallel_size=2 must divide the number of ranks, 1",
        ),
        (["train", "train.global_batch_size=9"], "train.global_batch_size=9 must be divisible by"),
        (["train", "--fast"], "--fast: no such option"),
        (["trian"], "trian: no such verb; did you mean `moe train`?"),
        (["report", "nowhere"], "nowhere"),
        (["report"], "give one run directory"),
        (["generate", "prompt=x"], "checkpoint"),
        (["generate", "checkpoint=nowhere", "prompt=x"], "checkpoint=nowhere: no checkpoint there"),
        (["generate", "checkpoint=x", "prompt=x", "temperature=-1"], "temperature=-1.0 must be ≥ 0"),
        (["bench", "nothing"], "nothing"),
    ],
)
def test_a_bad_command_is_one_line(
    overrides: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = _main(overrides, monkeypatch, capsys)
    assert code == 2
    assert len(error.splitlines()) == 1
    assert expected in error


def test_under_torchrun_only_rank_0_prints_the_line(moe: Run) -> None:
    done = moe("train", "router.top_k=9", ranks=2)
    assert done.returncode == 1
    line = "moe: router.top_k=9 must be ≤ router.num_experts=8"
    assert [shown for shown in done.stderr.splitlines() if shown.startswith("moe: ")] == [line]
    note = "(torchrun now reports that its processes ended, exit code 2; the reason is above)"
    assert done.stderr.splitlines()[:2] == [line, note], "before torchrun's lines, and nothing of ours among them"
    assert done.stderr.rstrip("=\n").endswith(f"traceback : {line}"), "torchrun's own table ends with the reason"
    assert "router.py" not in done.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_sequences_longer_than_the_shards_hold(moe: Run, ranks: int, tmp_path: Path) -> None:
    overrides = [*_files(tmp_path)["short"], f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"]
    done = moe("train", *overrides, *SMALL, "train.sequence_length=4096", ranks=ranks)
    assert done.returncode == (2 if ranks == 1 else 1)
    lines = [line for line in done.stderr.splitlines() if line.startswith("moe: ")]
    assert len(lines) == 1, done.stderr
    assert "sequence_length=4096" in lines[0]
    assert "loop.py" not in done.stderr, "a traceback of ours"


@pytest.mark.skipif(torch.cuda.is_available(), reason="they may run on a GPU")
@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("experts.backend=megablocks", "launch/install_megablocks.sh"),
        ("experts.backend=triton", "use experts.backend=auto"),
        ("model.attention=varlen", "use auto"),
    ],
)
def test_a_back_end_that_cannot_run_is_refused_before_data_is_prepared(
    moe: Run, tmp_path: Path, override: str, fix: str
) -> None:
    cache = tmp_path / "cache"
    overrides = [*_files(tmp_path)["short"], f"data.cache_dir={cache}", f"run_dir={tmp_path / 'run'}"]
    done = moe("train", *overrides, *SMALL, override)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("moe: ")]
    assert override in line
    assert fix in line
    assert not cache.exists() or not any(cache.iterdir())


def test_a_tokenizer_larger_than_the_model(moe: Run, corpus: list[str], tmp_path: Path) -> None:
    overrides = ["tokenizer=mistral", "tokenizer.vocab_size=null", f"run_dir={tmp_path}"]
    done = moe("train", *corpus, *SMALL, *overrides)
    assert done.returncode == 2, done.stderr
    assert "32000" in done.stderr
    assert "model.vocab_size=512" in done.stderr


def test_help_is_useful(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for overrides, expected in (
        (["train", "--help"], ["model=mistral_7b|mixtral_8x22b", "router.top_k=2", "train.micro_batch_size"]),
        (["generate", "--help"], ["temperature", "checkpoint"]),
        (["--help"], ["moe train", "moe report RUN_DIR"]),
        (["train", "--cfg", "job", "model=small"], ["hidden_size: 256", "run_dir: runs/small-stdlib"]),
    ):
        monkeypatch.setattr(sys, "argv", ["moe", *overrides])
        cli.main()
        output = capsys.readouterr().out
        for text in expected:
            assert text in output


@pytest.mark.parametrize("fault", ["list(zip([1], [1, 2], strict=True))", "a, b = [1]", "max([])", "int('x')"])
def test_a_fault_of_the_program_keeps_its_traceback(
    fault: str, moe: Run, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ValueError that isn't a UserError is no user's mistake: traceback, exit code 1."""
    broken = (
        "import moe.data.prepare as prepare\n\n\ndef fault(*_, **__):\n    " + fault + "\n\n\nprepare.prepare = fault\n"
    )
    (tmp_path / "sitecustomize.py").write_text(broken)
    done = moe("prepare", *corpus, more={"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"})
    assert done.returncode == 1, done.stderr
    assert "Traceback (most recent call last)" in done.stderr
    assert "ValueError" in done.stderr
    assert not done.stderr.startswith("moe: ")
