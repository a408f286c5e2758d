"""One checkpoint folder is enough: for text and for a new run's first weights (`init_from`). Runs of before
go on."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from moe.checkpoint.layout import committed
from moe.checkpoint.manifest import verify
from moe.checkpoint.model_writer import write_model
from moe.checkpoint.reader import load_model
from moe.config.compose import read_config
from moe.data.tokenizer import load_saved
from moe.errors import UserError
from tests.e2e.conftest import SMALL, read_metrics
from tests.faults.forked import Finished, moe_ranks

SHORT = [*SMALL, "train.steps=4", "train.eval_every=4", "train.sample_every=100", "checkpoint.every=2"]
# Steps too small to move a float32: the first evaluation is that of the weights it started from.
STILL = [*SMALL, "train.steps=1", "train.sample_every=100", "train.seed=5", "optim.lr=1e-30", "optim.warmup_steps=0"]
GENERATE = ["prompt=3 plus 4", "max_new_tokens=6", "temperature=0"]


def _trained(folder: Path, *overrides: str) -> Path:
    (done,) = moe_ranks("train", f"run_dir={folder}", *overrides)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def trained(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _trained(tmp_path_factory.mktemp("trained") / "run", *corpus, *SHORT)


@pytest.fixture(scope="module")
def model_folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, written without an optimizer."""
    newest, folder = committed(trained / "checkpoints")[0], tmp_path_factory.mktemp("model") / "model"
    write_model(folder, load_model(newest), load_saved(newest / "tokenizer"), read_config(newest / "config.yaml"))
    return folder


def _text(checkpoint: Path) -> str:
    (done,) = moe_ranks("generate", f"checkpoint={checkpoint}", *GENERATE)
    assert done.code == 0, done.err
    return done.out


def _refused(done: Finished, *texts: str) -> None:
    assert done.code == 2, done.out + done.err
    lines = [line for line in done.err.splitlines() if line.startswith("moe:")]
    assert len(lines) == 1, done.err
    for text in texts:
        assert text in lines[0]


def test_text_from_one_folder_alone(trained: Path, model_folder: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(committed(trained / "checkpoints")[0], tmp_path / "alone")
    text = _text(trained)
    assert text.startswith("3 plus 4")
    assert _text(alone) == _text(model_folder) == _text(committed(trained / "checkpoints")[0]) == text


def _parameters(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in load_model(folder).named_parameters()}


def test_a_model_folder_is_a_checkpoint_without_an_optimizer(trained: Path, model_folder: Path) -> None:
    newest = committed(trained / "checkpoints")[0]
    assert {path.name for path in newest.iterdir()} - {path.name for path in model_folder.iterdir()} == {"optimizer"}
    assert not list(model_folder.parent.glob("*.partial"))
    assert verify(model_folder) is None
    before, after = _parameters(newest), _parameters(model_folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    tokenizer, config = load_saved(newest / "tokenizer"), read_config(newest / "config.yaml")
    with pytest.raises(UserError, match="a model is written into a new folder"):
        write_model(model_folder, load_model(newest), tokenizer, config)


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_a_damaged_model_folder_is_refused(part: str, model_folder: Path, corpus: list[str], tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "damaged")
    path = next(path for path in sorted((folder / part).iterdir()))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (generated,) = moe_ranks("generate", f"checkpoint={folder}", *GENERATE)
    _refused(generated, str(folder), f"{part}/{path.name}")
    overrides = [*corpus, *STILL, f"init_from={folder}"]
    for ranks in (1, 2):
        done = moe_ranks("train", f"run_dir={tmp_path / 'run'}", *overrides, ranks=ranks)
        assert [one.code for one in done] == [2] * ranks
        _refused(done[0], *(["init_from=", path.name] if part == "model" else [str(folder / part)]))


CASES = [
    # ranks, expert-parallel size, ZeRO stage, and how far the validation loss may be
    (1, 1, 1, 0.0),
    (2, 2, 2, 1e-6),
]


@pytest.mark.parametrize(
    "source", ["run", *(pytest.param(one, marks=pytest.mark.slow) for one in ("checkpoint", "model"))]
)
@pytest.mark.parametrize(("ranks", "expert_parallel_size", "stage", "tolerance"), CASES)
def test_a_run_starts_from_the_weights_of_another(
    source: str,
    ranks: int,
    expert_parallel_size: int,
    stage: int,
    tolerance: float,
    trained: Path,
    model_folder: Path,
    corpus: list[str],
    tmp_path: Path,
) -> None:
    newest = committed(trained / "checkpoints")[0]
    path = {"run": trained, "checkpoint": newest, "model": model_folder}[source]
    parallel = [f"parallel.expert_parallel_size={expert_parallel_size}", f"parallel.zero_stage={stage}"]
    overrides = [f"run_dir={tmp_path}", *corpus, *STILL, *parallel, f"init_from={path}"]
    done = moe_ranks("train", *overrides, ranks=ranks)
    assert [one.code for one in done] == [0] * ranks, done[0].err
    assert f"starting from the weights of {path if source != 'run' else newest}" in done[0].out
    (row,) = read_metrics(tmp_path)
    expected = read_metrics(trained)[-1]["val_loss"]
    assert row["step"] == 1
    assert row["val_loss"] == (expected if tolerance == 0 else pytest.approx(expected, rel=tolerance))
    before, after = _parameters(newest), _parameters(committed(tmp_path / "checkpoints")[0])
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_either_precision_starts_from_the_other(trained: Path, corpus: list[str], tmp_path: Path) -> None:
    """Weights are float32 in a checkpoint, so that none is rounded on the way."""
    source, weights = trained, []
    for precision in ("bfloat16", "float32"):
        overrides = [*corpus, *STILL, f"train.precision={precision}", f"init_from={source}"]
        source = _trained(tmp_path / precision, *overrides)
        weights.append(_parameters(committed(source / "checkpoints")[0]))
        (row,) = read_metrics(source)
        expected: Any = read_metrics(trained)[-1]["val_loss"]
        assert row["val_loss"] == (expected if precision == "float32" else pytest.approx(expected, rel=5e-3))
    first = _parameters(committed(trained / "checkpoints")[0])
    assert all(torch.equal(one[name], first[name]) for one in weights for name in first)


def test_a_run_with_checkpoints_of_its_own_goes_on_from_them(
    trained: Path, model_folder: Path, corpus: list[str], tmp_path: Path
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    more = ["train.steps=5", "checkpoint.allow_changes=true", f"init_from={model_folder}"]
    (done,) = moe_ranks("train", f"run_dir={run}", *corpus, *SHORT, *more)
    assert done.code == 0, done.err
    assert "resuming from" in done.out
    assert "starting from" not in done.out
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5]
    # A folder without an optimizer in a checkpoint's place is told.
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(model_folder, run / "checkpoints" / "step_00000005")
    (refused,) = moe_ranks("train", f"run_dir={run}", *corpus, *SHORT, *more)
    _refused(refused, "a model without its optimizer: init_from=")


def test_a_models_folder_is_no_run_directory(model_folder: Path, corpus: list[str], tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (done,) = moe_ranks("train", f"run_dir={folder}", *corpus, *STILL)
    _refused(done, f"run_dir={folder}: holds a model, not a run", f"init_from={folder}")
    assert verify(folder) is None


def test_what_init_from_cannot_be(trained: Path, corpus: list[str], tmp_path: Path) -> None:
    (other,) = (tmp_path / "other.txt",)
    other.write_text("entirely other text, again and again\n" * 400)
    elsewhere = ["data=files", f"data.path={other}", f"data.cache_dir={tmp_path / 'cache'}"]
    elsewhere += ["tokenizer=sentencepiece", "tokenizer.vocab_size=300"]
    cases: list[tuple[list[str], list[str]]] = [
        ([*corpus, "init_from=''"], ["init_from='' must name"]),
        ([*corpus, f"init_from={tmp_path / 'nowhere'}"], ["init_from=", "no checkpoint there"]),
        ([*elsewhere, f"init_from={trained}"], ["tokenizer fingerprint", "the same ids would mean other"]),
        (
            [*corpus, f"init_from={trained}", "model.hidden_size=64", "router.num_experts=2"],
            ["init_from=", "model.hidden_size: 32 → 64", "router.num_experts: 4 → 2", "lm_head.weight is ["],
        ),
        (
            [*corpus, f"init_from={trained}", "model.num_hidden_layers=1"],
            ["model.num_hidden_layers: 2 → 1", "model.layers.1.input_layernorm.weight is [32] there, missing here"],
        ),
    ]
    for index, (overrides, texts) in enumerate(cases):
        (done,) = moe_ranks("train", f"run_dir={tmp_path / str(index)}", *STILL, *overrides)
        _refused(done, *texts)


def _as_before(run: Path) -> None:
    """Makes a run's checkpoints look as they did: other names in state.json and config.yaml, the tokenizer beside."""
    for checkpoint in committed(run / "checkpoints"):
        shutil.rmtree(run / "tokenizer", ignore_errors=True)
        (checkpoint / "tokenizer").rename(run / "tokenizer")
        state = json.loads((checkpoint / "state.json").read_text())
        state["refused_in_a_row"] = state.pop("skipped_in_a_row")
        config = yaml.safe_load((checkpoint / "config.yaml").read_text())
        del config["config_version"], config["init_from"]
        config["parallel"]["expert"] = config["parallel"].pop("expert_parallel_size")
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest = {name: entry for name, entry in manifest.items() if not name.startswith("tokenizer/")}
        for name, text in (("state.json", json.dumps(state)), ("config.yaml", yaml.safe_dump(config))):
            (checkpoint / name).write_text(text)
            digest = hashlib.sha256(text.encode()).hexdigest()
            manifest[name] = {"bytes": len(text.encode()), "sha256": digest}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest, indent=1))
        assert verify(checkpoint) is None


def test_a_run_of_before_goes_on(trained: Path, corpus: list[str], tmp_path: Path) -> None:
    run, text, whole = shutil.copytree(trained, tmp_path / "run"), _text(trained), read_metrics(trained)
    _as_before(run)
    assert _text(run) == text
    started = _trained(tmp_path / "started", *corpus, *STILL, f"init_from={run}")
    assert read_metrics(started)[-1]["val_loss"] == whole[-1]["val_loss"]
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    (done,) = moe_ranks("train", f"run_dir={run}", *corpus, *SHORT)
    assert done.code == 0, done.err
    assert "(step 2, " in done.out
    assert [row["lm_loss"] for row in read_metrics(run)] == [row["lm_loss"] for row in whole]
    assert _text(run) == text


ONLY_SIZES = [one for one in STILL if not one.startswith(("model.", "router."))]


def test_model_router_and_tokenizer_come_from_there(trained: Path, corpus: list[str], tmp_path: Path) -> None:
    """Nothing of them needs to be stated, a coefficient may be, and the run goes on when the source is gone."""
    source = shutil.copytree(trained, tmp_path / "source")
    overrides = [f"init_from={source}", *corpus, *ONLY_SIZES, "router.aux_loss_coef=0.5", f"run_dir={tmp_path / 'run'}"]
    (done,) = moe_ranks("train", *overrides)
    assert done.code == 0, done.err
    assert re.search(r"changed since then: router\.aux_loss_coef: \S+ → 0\.5", done.out)
    then, now = (read_config(committed(run / "checkpoints")[0] / "config.yaml") for run in (source, tmp_path / "run"))
    assert now.model == then.model
    assert (now.router.num_experts, now.router.aux_loss_coef) == (4, 0.5)
    assert read_metrics(tmp_path / "run")[0]["val_loss"] == read_metrics(trained)[-1]["val_loss"]
    shutil.rmtree(source)
    (more,) = moe_ranks("train", *overrides, "train.steps=2", "checkpoint.allow_changes=true")
    assert more.code == 0, more.err
    assert "resuming from" in more.out
    (elsewhere,) = moe_ranks("train", *overrides[:-1], f"run_dir={tmp_path / 'other'}")
    _refused(elsewhere, f"init_from={source}: no checkpoint there")


def test_what_the_command_states_is_not_taken_from_there(trained: Path) -> None:
    (done,) = moe_ranks("train", "--cfg", "job", f"init_from={trained}", "router=lossfree", "model.sliding_window=8")
    assert done.code == 0, done.err
    composed = yaml.safe_load(done.out)
    assert (composed["model"]["hidden_size"], composed["model"]["sliding_window"]) == (32, 8)
    assert (composed["router"]["bias_update"], composed["router"]["num_experts"]) == ("sign", 8)
    assert composed["tokenizer"]["path"].endswith("/tokenizer")
    assert composed["run_dir"] == f"runs/{trained.parent.name}-{trained.name}-stdlib"
