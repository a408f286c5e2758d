"""Out and in again by commands: a run of two ranks that share experts, and text from what came back."""

from __future__ import annotations

from pathlib import Path

import torch

from moe.checkpoint.layout import committed
from moe.checkpoint.reader import load_model
from moe.interop.tensor_source import CheckpointTensors
from tests.e2e.conftest import SMALL
from tests.faults.forked import moe_ranks

SHORT = [*SMALL, "train.steps=2", "train.eval_every=2", "train.sample_every=100", "checkpoint.every=2"]


def _moe(*words: str, ranks: int = 1) -> str:
    done = moe_ranks(*words, ranks=ranks)
    assert [one.code for one in done] == [0] * ranks, done[0].err
    return done[0].out


def test_a_run_whose_experts_lie_on_two_ranks(corpus: list[str], tmp_path: Path) -> None:
    run, out, back = tmp_path / "run", tmp_path / "out", tmp_path / "back"
    _moe("train", f"run_dir={run}", *corpus, *SHORT, "parallel.expert_parallel_size=2", ranks=2)
    expected = dict(load_model(run).named_parameters())
    source = CheckpointTensors(committed(run / "checkpoints")[0])
    for name, parameter in expected.items():
        assert torch.equal(source.read(name), parameter)
        if ".experts." in name:
            assert all(torch.equal(source.read(name, one), parameter[one]) for one in range(len(parameter)))
    assert "MixtralForCausalLM" in _moe("export", f"checkpoint={run}", f"path={out}")
    _moe("import", f"checkpoint={out}", f"run_dir={back}")
    found = dict(load_model(back).named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # Behind bytes that are no UTF-8 the two tokenizers write different replacements for the same ids.
    greedy = ["prompt=3 plus 4", "max_new_tokens=8", "temperature=0"]
    texts = [_moe("generate", f"checkpoint={one}", *greedy).partition("\ufffd")[0] for one in (run, back)]
    assert texts[0].startswith("3 plus 4")
    assert texts[0] == texts[1]
