"""`tokenizer.add_special_tokens`: a chat template's tokens are added to a source without them, trained, exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from moe.checkpoint.layout import committed
from moe.checkpoint.reader import load_model
from moe.config.compose import read_config
from moe.data.tokenizer import load_saved
from tests.e2e.conftest import SMALL, read_metrics
from tests.faults.forked import Finished, moe_ranks

BASE = [
    *SMALL,
    "model.vocab_size=300",
    "train.steps=2",
    "train.eval_every=2",
    "train.sample_every=100",
    "checkpoint.every=2",
]
ADDED = "tokenizer.add_special_tokens=[<|im_start|>,<|im_end|>]"
LORA = ["adapter=lora", "adapter.r=2", "adapter.modules_to_save=[embed_tokens,lm_head]"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _run(folder: Path, *overrides: str, ranks: int = 1) -> Finished:
    done = moe_ranks("train", f"run_dir={folder}", *overrides, ranks=ranks)
    assert [one.code for one in done] == [0] * ranks, done[0].err
    return done[0]


@pytest.fixture(scope="module")
def base(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "run"
    _run(folder, *corpus, *BASE)
    return folder


@pytest.fixture(scope="module")
def start(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"prompt": f"<|im_end|> {a} plus {b}?", "completion": f"{a + b}"} for a in range(20) for b in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = [one for one in BASE if not one.startswith(("model.", "router.", "train.steps"))]
    return [
        "experiment=sft", f"init_from={base}", f"data.path={folder / 'rows.jsonl'}", "data.template=chatml",
        f"data.cache_dir={folder / 'cache'}", *sizes, "train.steps=4", ADDED,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tuned(start: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    _run(folder, *start)
    return folder


def _losses(run: Path) -> list[object]:
    return [row["lm_loss"] for row in read_metrics(run)]


def test_new_rows_are_the_mean_of_the_others(base: Path, start: list[str], tmp_path: Path) -> None:
    _run(tmp_path, *start, "train.steps=1", "optim.lr=1e-30", "optim.warmup_steps=0")
    before, after = (dict(load_model(folder).named_parameters()) for folder in (base, tmp_path))
    for name, weight in after.items():
        if name in (EMBEDDING, HEAD):
            assert weight.shape[0] == 302
            mean_H = before[name].double().mean(0).float()
            assert torch.equal(weight[300:], mean_H.expand(2, -1))
            assert torch.equal(weight[:300], before[name])
        else:
            assert torch.equal(weight, before[name]), name
    assert not (tmp_path / "base").exists()


def test_the_same_losses_on_two_ranks_after_a_resume_and_without_the_source(
    start: list[str], tuned: Path, base: Path, tmp_path: Path
) -> None:
    topology = ["parallel.expert_parallel_size=2", "parallel.zero_stage=2"]
    _run(tmp_path, *start, *topology, ranks=2)
    assert _losses(tmp_path) == pytest.approx(_losses(tuned), rel=2e-6)
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000004")
    gone = base.rename(base.with_name("gone"))
    try:
        done = _run(tmp_path, *start)
    finally:
        gone.rename(base)
    assert "(step 2, " in done.out
    assert _losses(tmp_path) == pytest.approx(_losses(tuned), rel=2e-6)


def test_the_export_has_them(tuned: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    newest = committed(tuned / "checkpoints")[0]
    assert read_config(newest / "config.yaml").model.vocab_size == 302
    saved = load_saved(newest / "tokenizer")
    assert saved.special_tokens()["<|im_end|>"] == 301
    out = tmp_path / "out"
    (done,) = moe_ranks("export", f"checkpoint={tuned}", f"path={out}")
    assert done.code == 0, done.err
    model, theirs = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(theirs) == 302
    assert model.generation_config.eos_token_id == [saved.eos_id, 301]
    messages = [{"role": "user", "content": "3 plus 4?"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids.count(300) == 2
    assert ids.count(301) == 1
    with torch.no_grad():
        logits, ours = model(torch.tensor([ids])).logits, load_model(tuned)(torch.tensor([ids])).logits_BSV
    torch.testing.assert_close(logits, ours, rtol=0, atol=1e-5)
    (done,) = moe_ranks("generate", f"checkpoint={tuned}", "prompt=3 plus 4?", "chat=true", "max_new_tokens=8")
    assert done.code == 0, done.err
    # The export is a source too, and has the tokens already.
    (done,) = moe_ranks("plan", f"init_from={out}", ADDED, "train.sequence_length=64", "plan.json=true")
    assert done.code == 0, done.err


def test_an_adapter_trains_the_rows(start: list[str], tmp_path: Path) -> None:
    for overrides, rule in (
        (["adapter=lora"], "adds rows to model.embed_tokens, which an adapter leaves as they are: set "
         "adapter.modules_to_save=[embed_tokens,lm_head]"),
        (["adapter=lora", "adapter.modules_to_save=[embed_tokens]"], "adds rows to lm_head, which"),
        (["optim.freeze=['*embed*']"], "optim.freeze=*embed* keeps from training: leave that pattern out"),
        (["tokenizer.add_special_tokens=[<|im_start|>,</s>]"], "</s>: the tokenizer has it already, with id"),
        (["model.vocab_size=300"], "model.vocab_size=300 must be ≥ 302"),
    ):  # fmt: skip
        (done,) = moe_ranks("train", f"run_dir={tmp_path / 'refused'}", *start, *overrides)
        assert done.code == 2, done.out + done.err
        (line,) = [line for line in done.err.splitlines() if line.startswith("moe:")]
        assert rule in line
    _run(tmp_path / "run", *start, *LORA)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    rows = dict(load_model(moved).named_parameters())[EMBEDDING][300:]
    assert rows.shape == (2, 32)
    assert not torch.equal(rows[0], rows[1])  # trained


def test_a_tokenizer_without_them_is_told_so(start: list[str], tmp_path: Path) -> None:
    (done,) = moe_ranks("train", f"run_dir={tmp_path}", *(one for one in start if one != ADDED))
    assert done.code == 2
    assert f"'{ADDED}' adds them" in done.err
