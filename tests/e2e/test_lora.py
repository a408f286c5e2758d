"""`moe train adapter=lora init_from=RUN`: what trains, what a checkpoint holds, resumes, topologies, mistakes."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe import api
from moe.checkpoint.layout import committed
from moe.checkpoint.reader import load_model
from tests.e2e.conftest import SMALL, read_metrics
from tests.faults.forked import Finished, moe_ranks

BASE = [*SMALL, "train.steps=4", "train.eval_every=4", "train.sample_every=100", "checkpoint.every=2"]
TUNE = [
    *(one for one in BASE if not one.startswith(("model.", "router."))), "adapter=lora", "adapter.r=4",
    "adapter.target_modules=[q_proj,v_proj,gate,experts]", "adapter.modules_to_save=[model.norm]",
    "router.aux_loss_coef=0.01", "optim.weight_decay=0",
]  # fmt: skip


def _run(folder: Path, *overrides: str, ranks: int = 1) -> list[Finished]:
    done = moe_ranks("train", f"run_dir={folder}", *overrides, ranks=ranks)
    assert [one.code for one in done] == [0] * ranks, done[0].err
    return done


@pytest.fixture(scope="module")
def base(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "run"
    _run(folder, *corpus, *BASE)
    return folder


@pytest.fixture(scope="module")
def tuned(base: Path, corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    _run(folder, f"init_from={base}", *corpus, *TUNE)
    return folder


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_checkpoint_holds_what_trains_and_text_comes_from_the_merged_model(base: Path, tuned: Path) -> None:
    newest = committed(tuned / "checkpoints")[0]
    names = _tensors(newest / "model").keys()
    attention = {f"self_attn.{name}.lora.{part}" for name in ("q_proj", "v_proj") for part in "AB"}
    experts = {f"mlp.experts.{name}_lora.{part}" for name in ("gate_up_proj", "down_proj") for part in "AB"}
    layer = attention | experts | {"mlp.gate.lora.A", "mlp.gate.lora.B"}
    assert names == {f"model.layers.{number}.{one}" for number in range(2) for one in layer} | {"model.norm.weight"}
    before, after = (dict(load_model(folder).named_parameters()) for folder in (base, tuned))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {
        "model.norm.weight",
        *(f"model.layers.{number}.self_attn.{one}_proj.weight" for number in range(2) for one in "qv"),
        *(f"model.layers.{number}.mlp.experts.{one}_proj" for number in range(2) for one in ("gate_up", "down")),
        *(f"model.layers.{number}.mlp.gate.weight" for number in range(2)),
    }
    (done,) = moe_ranks("generate", f"checkpoint={tuned}", "prompt=3 plus 4", "max_new_tokens=4", "temperature=0")
    assert done.code == 0, done.err


def test_the_same_losses_on_two_ranks_and_after_a_resume(
    base: Path, tuned: Path, corpus: list[str], tmp_path: Path
) -> None:
    expected = [row["lm_loss"] for row in read_metrics(tuned)]
    assert expected[0] != expected[-1]
    topology = ["parallel.expert_parallel_size=2", "parallel.zero_stage=2"]
    _run(tmp_path / "two", f"init_from={base}", *corpus, *TUNE, *topology, ranks=2)
    assert [row["lm_loss"] for row in read_metrics(tmp_path / "two")] == pytest.approx(expected, rel=2e-6)
    # Back to one process, from the checkpoint of two ranks in the middle.
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step_00000004")
    (done,) = _run(tmp_path / "two", f"init_from={base}", *corpus, *TUNE)
    assert "(step 2, " in done.out
    assert [row["lm_loss"] for row in read_metrics(tmp_path / "two")] == pytest.approx(expected, rel=2e-6)


def test_a_frozen_part_of_an_adapter_is_kept_and_resumed(base: Path, corpus: list[str], tmp_path: Path) -> None:
    run, frozen = tmp_path / "run", "optim.freeze=['*.lora.A','*_lora.A']"
    _run(run, f"init_from={base}", *corpus, *TUNE, frozen)
    rows, expected = read_metrics(run), load_model(run).state_dict()
    last, first = (_tensors(folder / "model") for folder in committed(run / "checkpoints"))
    assert last.keys() == first.keys()
    assert all(torch.equal(last[name], first[name]) is name.endswith(".A") for name in last)
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    done = _run(run, f"init_from={base}", *corpus, *TUNE, frozen, "parallel.expert_parallel_size=2", ranks=2)
    assert "(step 2, " in done[0].out
    losses = [[row["lm_loss"] for row in found] for found in (read_metrics(run), rows)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)
    torch.testing.assert_close(load_model(run).state_dict(), expected)


def test_a_run_starts_from_an_adapters_merged_weights(tuned: Path, corpus: list[str], tmp_path: Path) -> None:
    still = [f"init_from={tuned}", *corpus, "train.steps=1", "optim.lr=1e-30", "optim.warmup_steps=0"]
    sizes = [one for one in TUNE if "adapter" not in one and not one.startswith(("train.steps", "optim."))]
    merged = dict(load_model(tuned).named_parameters())
    _run(tmp_path / "full", *sizes, *still)
    assert not (tmp_path / "full" / "base").exists()
    _run(tmp_path / "two", *sizes, *still, "adapter=lora", "parallel.expert_parallel_size=2", ranks=2)
    state = json.loads((committed(tmp_path / "two" / "checkpoints")[0] / "state.json").read_text())
    assert state["base"] == "base"
    moved = (tmp_path / "two").rename(tmp_path / "moved")
    for run in (tmp_path / "full", moved):
        found = dict(load_model(run).named_parameters())
        assert found.keys() == merged.keys()
        for name, weight in found.items():
            assert torch.equal(weight, merged[name]), name


def test_a_loaded_adapters_run_is_saved_as_a_whole_model(tuned: Path, tmp_path: Path) -> None:
    run = api.load(tuned, device="cpu")
    run.save(tmp_path / "saved")
    again = api.load(tmp_path / "saved", device="cpu")
    assert (again.state.base, again.config.adapter.trains_adapter) == ("", False), "it is read without the base"
    assert torch.equal(again.logits("3 plus 4"), run.logits("3 plus 4"))


def _refused(done: Finished, *texts: str) -> None:
    assert done.code == 2, done.out + done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("moe:")]
    for text in texts:
        assert text in line


def test_mistakes(base: Path, tuned: Path, corpus: list[str], tmp_path: Path) -> None:
    start = [f"init_from={base}", *corpus, *TUNE]
    cases = {
        "adapter.kind=lora needs init_from": [*corpus, *TUNE],
        "adapter.target_modules=q_prj: must be one of": [*start, "adapter.target_modules=[q_prj]"],
        "adapter.target_modules=up_proj: no module of this model fits; it has experts, gate, k_proj": [
            *start, "adapter.target_modules=[up_proj]",
        ],
        "adapter.modules_to_save=*.nothing: no parameter": [*start, "adapter.modules_to_save=['*.nothing']"],
        "adapter.use_dora=true is read with an adapter only": [f"init_from={base}", *corpus, "adapter.use_dora=true"],
        "adapter.r=2, but the checkpoint": [f"run_dir={tuned}", *start, "adapter.r=2"],
        "optim.freeze=*: leaves nothing to train": [
            f"init_from={base}", *corpus, *(one for one in TUNE if "adapter" not in one), "optim.freeze=['*']",
        ],
    }  # fmt: skip
    for text, overrides in cases.items():
        (done,) = moe_ranks("train", f"run_dir={tmp_path / 'run'}", *overrides)
        _refused(done, text)


def _base_of(run: Path) -> str:
    return str(json.loads((committed(run / "checkpoints")[0] / "state.json").read_text())["base"])


def test_an_adapters_base_outlives_the_run_that_made_it(base: Path, corpus: list[str], tmp_path: Path) -> None:
    other, run = shutil.copytree(base, tmp_path / "other"), tmp_path / "run"
    (done,) = _run(run, f"init_from={other}", *corpus, *TUNE)
    assert _base_of(run) == "base"
    assert f"linked {committed(other / 'checkpoints')[0]} into {run / 'base'}" in done.out
    weights = [path.relative_to(run / "base") for path in (run / "base").rglob("*.safetensors")]
    assert weights, "without the optimizer's"
    assert all(name.parts[0] == "model" for name in weights)
    source = committed(other / "checkpoints")[0]
    assert all((run / "base" / name).samefile(source / name) for name in weights), "links take no room"
    expected = load_model(run).state_dict()
    shutil.rmtree(other)
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    moved = run.rename(tmp_path / "moved")
    (done,) = _run(moved, f"init_from={other}", *corpus, *TUNE)
    assert "resuming from" in done.out
    torch.testing.assert_close(load_model(moved).state_dict(), expected)


def test_what_lies_at_the_place_of_the_base_is_not_removed(base: Path, corpus: list[str], tmp_path: Path) -> None:
    inside = shutil.copytree(base, tmp_path / "outer" / "base")
    before = sorted(path for path in inside.rglob("*"))
    (done,) = moe_ranks("train", f"run_dir={tmp_path / 'outer'}", f"init_from={inside}", *corpus, *TUNE)
    _refused(done, f"{inside} is in the way", "name another run_dir")
    assert sorted(path for path in inside.rglob("*")) == before


def test_without_links_an_adapters_base_must_stay(base: Path, corpus: list[str]) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == base.stat().st_dev:
        pytest.skip("needs a second file system")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        (done,) = _run(Path(folder) / "run", f"init_from={base}", *corpus, *TUNE)
        source = committed(base / "checkpoints")[0]
        assert f"the adapter needs {source}, which must stay" in done.out + done.err
        assert _base_of(Path(folder) / "run") == str(source)
        assert not list(Path(folder).glob("run/base*"))


def test_an_adapter_whose_base_changed_or_is_gone_is_refused(base: Path, corpus: list[str], tmp_path: Path) -> None:
    other, run = shutil.copytree(committed(base / "checkpoints")[0], tmp_path / "model"), tmp_path / "run"
    _run(run, f"init_from={other}", *corpus, *TUNE)
    assert _base_of(run) == str(other)
    generate = ["generate", f"checkpoint={run}", "prompt=3", "max_new_tokens=2"]
    shutil.rmtree(other)
    (done,) = moe_ranks(*generate)
    _refused(done, "an adapter of the weights in", "put them back")
    _run(tmp_path / "third", *corpus, *BASE, "train.seed=3")
    shutil.copytree(committed(tmp_path / "third" / "checkpoints")[0], other)
    (done,) = moe_ranks(*generate)
    _refused(done, "an adapter of other weights than")
    (done,) = moe_ranks(
        "train",
        f"run_dir={run}",
        f"init_from={other}",
        *corpus,
        *TUNE,
        "train.steps=5",
        "checkpoint.allow_changes=true",
    )
    _refused(done, "an adapter of other weights than")


@pytest.fixture(scope="module")
def hub(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("hub") / "base"
    (done,) = moe_ranks("export", f"checkpoint={base}", f"path={folder}")
    assert done.code == 0, done.err
    return folder


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(60).view(2, 30)).logits


@pytest.mark.parametrize("options", [[], ["adapter.use_rslora=true", "adapter.rank_pattern={q_proj:2,experts:3}"]])
def test_from_a_hugging_face_folder_to_transformers_and_peft(
    options: list[str], hub: Path, corpus: list[str], tmp_path: Path
) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    rest = [one for one in TUNE if "modules_to_save" not in one]
    _run(tmp_path / "run", f"init_from={hub}", *corpus, *rest, *options, "optim.lr=0.05")
    state = json.loads((committed(tmp_path / "run" / "checkpoints")[0] / "state.json").read_text())
    assert state["base"] == "base", "inside the run directory, which can be moved"
    run = (tmp_path / "run").rename(tmp_path / "moved")
    with torch.no_grad():
        expected = load_model(run)(torch.arange(60).view(2, 30)).logits_BSV
    for path, more in (("merged", []), ("adapter", ["format=peft"])):
        (done,) = moe_ranks("export", f"checkpoint={run}", f"path={tmp_path / path}", *more)
        assert done.code == 0, done.err
    read = transformers.AutoModelForCausalLM.from_pretrained
    before = read(hub, dtype=torch.float32)
    assert (_logits(before) - expected).abs().max() > 0.05
    bound = 1e-5 * max(1.0, expected.abs().max().item())
    assert (_logits(read(tmp_path / "merged", dtype=torch.float32)) - expected).abs().max() <= bound
    adapted = peft.PeftModel.from_pretrained(before, tmp_path / "adapter")
    assert (_logits(adapted) - expected).abs().max() <= bound


def test_what_peft_cannot_hold(tuned: Path, base: Path, tmp_path: Path) -> None:
    for run, text in ((tuned, "format=peft: adapter.modules_to_save="), (base, "holds a whole model, no adapter")):
        (done,) = moe_ranks("export", f"checkpoint={run}", f"path={tmp_path / 'out'}", "format=peft")
        _refused(done, text)
        assert not (tmp_path / "out").exists()


def test_the_export_is_the_merged_model(tuned: Path, tmp_path: Path) -> None:
    (done,) = moe_ranks("export", f"checkpoint={tuned}", f"path={tmp_path / 'exported'}")
    assert done.code == 0, done.err
    (done,) = moe_ranks("import", f"checkpoint={tmp_path / 'exported'}", f"run_dir={tmp_path / 'run'}")
    assert done.code == 0, done.err
    expected = dict(load_model(tuned).named_parameters())
    written = dict(load_model(tmp_path / "run").named_parameters())
    assert written.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(written[name], parameter, rtol=0, atol=1e-6)
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "Started from the weights of" in card
    assert "| val_loss |" in card
    assert "fingerprint of the token shards `" in card
