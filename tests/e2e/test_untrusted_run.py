"""A run directory that somebody else made, with manifests that fit it: each command ends with one line that names file
and key, never hangs, reads no other file and prints no variable of the environment."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from moe.checkpoint.reader import read_model, resolve, tokenizer_folder
from moe.checkpoint.state import read_state
from moe.data.corpus import open_corpus
from moe.data.tokenizer import load_saved
from moe.errors import UserError
from moe.train.tracking import cut_back
from tests.e2e.conftest import SMALL, Run
from tests.faults.forked import moe_ranks

SHORT = [*SMALL, "engine=plain", "train.steps=2", "checkpoint.every=1", "train.eval_every=2", "train.sample_every=2"]
pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def trained(moe: Run, corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = moe("train", *corpus, *SHORT, f"run_dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def newest(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step_*"))


def put(checkpoint: Path, name: str, content: bytes) -> None:
    """Replaces a file of the checkpoint, in its manifest too."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest[name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def changed(path: Path, key: str, value: Any) -> bytes:
    """A JSON object with one value changed, or without it (`...`)."""
    values = json.loads(path.read_text())
    values[key] = value
    return json.dumps({name: one for name, one in values.items() if one is not ...}).encode()


COUNT = [..., None, True, "1", 1.5, -1, 10**400, [1], {"a": 1}, float("nan")]
STATES = [(key, value) for key in ("step", "consumed", "tokens") for value in COUNT]
STATES += [(key, value) for key in ("tokenizer", "data") for value in (..., 3, None, ["x"])]
STATES += [("elapsed", "x"), ("elapsed", 1e300), ("elapsed", -1.0), ("skipped_steps", 3), ("skipped_in_a_row", True)]
STATES += [("recent_norms", 1), ("recent_norms", [True]), ("recent_norms", [float("inf")]), ("versions", [1])]


@pytest.mark.parametrize(("key", "value"), STATES, ids=lambda one: str(one)[:12])
def test_a_value_of_the_state_is_named(run_dir: Path, key: str, value: Any) -> None:
    folder = newest(run_dir)
    put(folder, "state.json", changed(folder / "state.json", key, value))
    assert resolve(run_dir) == folder, "the manifest fits"
    with pytest.raises(UserError) as caught:
        read_state(folder)
    line = str(caught.value)
    assert line.startswith(str(folder / "state.json"))
    assert key in line or "is no number of JSON" in line
    assert "\n" not in line


CARDS: list[tuple[str, Any, str]] = [
    ("file", "/dev/zero", 'file="/dev/zero" must be text of the form'),
    ("file", "../../../metrics.jsonl", "file="),
    ("file", "..", "file="),
    ("file", "", "file="),
    ("file", 3, "file=3"),
    ("file", ..., "file is missing"),
    ("fingerprint", "x", 'fingerprint="x" must be text of the form'),
    *(("vocab_size", value, "vocab_size") for value in COUNT[:-1]),
    ("bos_id", 10**6, "bos_id=1000000 must be a whole number from 0 to"),
    ("eos_id", True, "eos_id"),
    ("bos_id", 2, "bos_id=2 must be 1"),
]


@pytest.mark.parametrize(("key", "value", "message"), CARDS, ids=lambda one: str(one)[:16])
def test_a_tokenizers_card_names_no_other_file(run_dir: Path, key: str, value: Any, message: str) -> None:
    folder = newest(run_dir)
    card = folder / "tokenizer/moe_tokenizer.json"
    put(folder, "tokenizer/moe_tokenizer.json", changed(card, key, value))
    with pytest.raises(UserError) as caught:
        load_saved(tokenizer_folder(resolve(run_dir)))
    assert str(caught.value).startswith(f"{card}: {message}")


METAS: list[tuple[list[str], Any, str]] = [
    (["tokenizer", "vocab_size"], "512", 'tokenizer.vocab_size="512" must be a whole number'),
    (["sources", "text", "train", "tokens"], True, "sources.text.train.tokens=true must be a whole number"),
    (["sources", "text", "train", "shard_tokens"], 0, "sources.text.train.shard_tokens=0 must be a whole number"),
    (["sources", "text", "held_out", "documents"], 10**400, "sources.text.held_out.documents="),
    (["sources", "text", "train", "sha256"], [1], "sources.text.train.sha256=[1] must be an object"),
    (["sources", "text", "description"], 3, "sources.text.description=3 must be text"),
    (["sources", "text"], 3, "sources.text=3 must be an object"),
    (["fingerprint"], None, "fingerprint=null must be text"),
]


@pytest.mark.parametrize(("keys", "value", "message"), METAS, ids=lambda one: str(one)[:30])
def test_a_value_of_a_corpus_is_named(
    trained: Path, corpus: list[str], tmp_path: Path, keys: list[str], value: Any, message: str
) -> None:
    cache = Path(corpus[-1].partition("=")[2])
    source = next(path.parent for path in cache.glob("*/meta.json"))
    folder = shutil.copytree(source, tmp_path / "corpus")
    meta = json.loads((folder / "meta.json").read_text())
    place = meta
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError) as caught:
        open_corpus(folder, {}, print)
    assert str(caught.value).startswith(f"{folder / 'meta.json'}: {message}")


@pytest.mark.parametrize("value", [1.5, "1", True, -1, None, 10**400, {"a": 1}], ids=lambda one: str(one)[:8])
def test_a_step_that_is_none_stops_a_resume_instead_of_losing_its_line(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{{"st\n{json.dumps({"step": value})}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics.jsonl:3: step=.* must be a whole number from 0"):
        cut_back(path, 5)
    assert path.read_bytes() == before


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _zero(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


GENERATE = ["generate", "checkpoint=run", "prompt=3", "max_new_tokens=2"]
TRAIN = ["train", "run_dir=run", "train.steps=4", "checkpoint.allow_changes=true"]
OTHERS = "manifest.json", "state.json", "config.yaml", "tokenizer/moe_tokenizer.json", "tokenizer/tokenizer.model"


@pytest.mark.parametrize("make", [_fifo, _zero])
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_run_does_not_start_over_a_fifo(
    run_dir: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], name: str
) -> None:
    make(run_dir / name)
    monkeypatch.chdir(run_dir.parent)
    (done,) = moe_ranks(TRAIN[0], *corpus, *SHORT, *TRAIN[1:], timeout=60)
    assert done.code == 2, done.err
    assert f"run/{name}: must be a regular file, not a " in done.err


@pytest.mark.parametrize("make", [_fifo, _zero])
@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_with_a_fifo_is_damaged(run_dir: Path, make: Callable[[Path], None], name: str) -> None:
    make(newest(run_dir) / name)
    said: list[str] = []
    assert resolve(run_dir, said.append) == min((run_dir / "checkpoints").glob("step_*"))
    assert "damaged checkpoint" in said[0]


def test_a_variable_of_the_environment_is_never_resolved(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.chdir(run_dir.parent)
    folder = newest(run_dir)
    config = (folder / "config.yaml").read_text().replace("name: null", "name: ${oc.env:SECRET}")
    assert "SECRET" in config
    put(folder, "config.yaml", config.encode())
    (run_dir / "config.yaml").write_text(config)
    for arguments in (GENERATE, ["report", "run"]):
        (done,) = moe_ranks(*arguments, timeout=60)
        assert done.code == 2
        assert "${oc.env:SECRET} is an interpolation: a saved configuration has none" in done.err
        assert "hunter2" not in done.out + done.err


def test_optimizer_shards_are_not_read_to_generate(run_dir: Path) -> None:
    """Verified is what is read: the model, its tokenizer and the small files."""
    folder = newest(run_dir)
    for shard in (folder / "optimizer").iterdir():
        shard.unlink()
        os.mkfifo(shard)
    assert resolve(run_dir) == folder
    assert read_model(folder).device.type == "cpu"


def test_device_and_dtype_act(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir.parent)
    for words, message in (
        (["device=tpu"], "device=tpu must be auto, cpu, cuda or cuda:N"),
        (["device=cuda:77"], "device=cuda:77: torch sees "),
        (["dtype=float16"], "dtype=float16 must be one of"),
    ):
        (done,) = moe_ranks(*GENERATE, *words, timeout=60)
        assert done.code == 2
        assert message in done.err
    (done,) = moe_ranks(*GENERATE, "device=cpu", "dtype=bfloat16", timeout=60)
    assert done.code == 0, done.err
