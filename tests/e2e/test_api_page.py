"""docs/api.md: its code runs as it stands, block after block, on a small run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe import api
from tests.e2e.conftest import SMALL, Run

PAGE = Path(__file__).resolve().parents[2] / "docs/api.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def folder(moe: Run, corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    short = ["engine=plain", "train.steps=2", "checkpoint.every=2"]
    done = moe("train", *corpus, *SMALL, *short, f"run_dir={folder / 'runs/tiny-stdlib'}")
    assert done.returncode == 0, done.stderr
    return folder


def test_the_page_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(block, names)
    losses = re.findall(r"(?m)^\d (\d+\.\d+)$", capsys.readouterr().out)
    assert len(losses) == 5
    assert float(losses[-1]) < float(losses[0])


def test_routing_and_logits_are_the_models(folder: Path) -> None:
    run = api.load(folder / "runs/tiny-stdlib", device="cpu")
    ids_S = run.encode("3 plus 4")
    with torch.no_grad():
        output = run.model(ids_S[None])
    assert torch.equal(run.logits("3 plus 4"), output.logits_BSV[0, :, : run.tokenizer.vocab_size])
    routing = run.routing("3 plus 4")
    assert len(routing) == run.config.model.num_hidden_layers
    for layer, router in zip(routing, output.routers, strict=True):
        assert [experts for token in layer.experts for experts in token] == router.choices.experts_N.tolist()
        assert len(layer.experts) == len(ids_S)
        for experts, weights, probabilities in zip(
            layer.experts, layer.weights, layer.probabilities_SE.tolist(), strict=True
        ):
            assert len(experts) == len(weights) == run.config.router.experts_per_token
            assert experts[0] == probabilities.index(max(probabilities))


def test_bfloat16_is_the_models_dtype_and_close(folder: Path) -> None:
    half, full = (api.load(folder / "runs/tiny-stdlib", device="cpu", dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    for name, parameter in full.model.named_parameters():
        assert torch.equal(half.model.get_parameter(name), parameter.bfloat16()), name
    torch.testing.assert_close(half.logits("3 plus 4").float(), full.logits("3 plus 4"), rtol=0, atol=0.1)


def test_mistakes_are_one_line(folder: Path) -> None:
    for keywords, message in (
        ({"device": "cuda:99"}, "device=cuda:99: torch sees "),
        ({"dtype": "float16"}, "dtype=float16 must be one of float32, bfloat16"),
    ):
        with pytest.raises(api.UserError, match=f"^{message}[^\n]*$"):
            api.load(folder / "runs/tiny-stdlib", **keywords)
    with pytest.raises(api.UserError, match="no checkpoint there"):
        api.load(folder)


def test_the_package_alone_loads_nothing() -> None:
    program = "import sys, moe; sys.exit('torch' in sys.modules or 'hydra' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
