"""Files in a checkpoint's folder that its manifest doesn't list, and manifests that don't fit their files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe.checkpoint.layout import committed
from moe.checkpoint.manifest import entry, verify
from moe.checkpoint.reader import load_model
from moe.errors import UserError
from tests.faults.forked import moe_ranks
from tests.faults.live import OVERRIDES, assert_same_run

Outcome = Callable[[str], None]


@pytest.fixture
def earlier(undisturbed: Callable[..., Path], tmp_path: Path) -> Path:
    """A finished run without its last checkpoint."""
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed(2), run_dir)
    shutil.rmtree(committed(run_dir / "checkpoints")[0])
    return run_dir


def _zeroed_copy(shard: Path, copy: Path) -> None:
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(shard).items()}, copy, metadata)


@pytest.mark.fault(16)
def test_stray_shards_are_named_and_not_read(
    corpus: list[str], undisturbed: Callable[..., Path], earlier: Path, outcome: Outcome
) -> None:
    (checkpoint, *_) = committed(earlier / "checkpoints")
    strays = []
    for part in ("model", "optimizer"):
        for shard in sorted((checkpoint / part).iterdir()):
            for name in (f"a-{shard.name}", f"z-{shard.name}"):  # before and after it in any order of names
                _zeroed_copy(shard, shard.with_name(name))
                strays.append(shard.with_name(name))
    done = moe_ranks(*OVERRIDES, *corpus, f"run_dir={earlier}", ranks=2)
    assert [one.code for one in done] == [0, 0], done[0].err
    said = "".join(one.out + one.err for one in done)
    assert f"resuming from {checkpoint}" in said
    for path in strays:
        assert said.count(f"{path} is not in the checkpoint's manifest and is not read") == 1
    assert_same_run(earlier, undisturbed(2))
    outcome(f"{len(strays)} zeroed copies of shards: each named, none read; resumed, bitwise equal")


def _edit(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def _without(part: str) -> Callable[[dict[str, object]], None]:
    def change(manifest: dict[str, object]) -> None:
        for name in [name for name in manifest if name.startswith(f"{part}/")]:
            del manifest[name]

    return change


FILE = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("model"), "it lists no file of model/"),
        (lambda manifest: manifest.update({"../x": FILE}), "'../x' is no file inside the checkpoint"),
        (lambda manifest: manifest.update({"/etc/passwd": FILE}), "'/etc/passwd' is no file inside the checkpoint"),
        (lambda manifest: manifest.update({"model//x": FILE}), "'model//x' is no file inside the checkpoint"),
        (lambda manifest: manifest.update({"x": 3}), "x has no number of bytes"),
        (lambda manifest: manifest.update({"x": FILE | {"bytes": -1}}), "x has no number of bytes"),
        (lambda manifest: manifest.update({"x": FILE | {"bytes": True}}), "x has no number of bytes"),
        (lambda manifest: manifest.update({"x": FILE | {"sha256": 7}}), "x has no SHA-256"),
        (lambda manifest: manifest.pop("state.json"), "it doesn't list state.json"),
    ],
)
def test_a_manifest_that_is_none(earlier: Path, change: Callable[[dict[str, object]], None], message: str) -> None:
    (checkpoint, *_) = committed(earlier / "checkpoints")
    _edit(checkpoint, change)
    found = verify(checkpoint)
    assert found is not None
    assert message in found


@pytest.mark.fault(16)
def test_a_manifest_must_hold_every_tensor_once(earlier: Path) -> None:
    (checkpoint, *_) = committed(earlier / "checkpoints")
    first, *_ = sorted((checkpoint / "model").iterdir())
    shutil.copy(first, first.with_name("again.safetensors"))
    _edit(checkpoint, lambda manifest: manifest.update({"model/again.safetensors": entry(first)}))
    with pytest.raises(UserError, match=r"damaged checkpoint, model: .* is there more than once"):
        load_model(checkpoint)
    first.unlink()
    _edit(checkpoint, lambda manifest: manifest.pop(f"model/{first.name}"))
    assert load_model(checkpoint) is not None, "the copy alone is whole"
    (checkpoint / "model" / "again.safetensors").unlink()
    _edit(checkpoint, lambda manifest: manifest.pop("model/again.safetensors"))
    with pytest.raises(UserError, match=r"damaged checkpoint, model: .* lacks rows|does not fit this model"):
        load_model(checkpoint)


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", True),
        ("step", 1.5),
        ("tokens", -1),
        ("consumed", 10**30),
        ("elapsed", "long"),
        ("recent_norms", ["1.0"]),
        ("recent_norms", [1e301]),
        ("tokenizer", None),
        ("versions", {"moe": 3}),
    ],
)
def test_values_of_the_state_are_checked(corpus: list[str], earlier: Path, key: str, value: object) -> None:
    (checkpoint, *_) = committed(earlier / "checkpoints")
    path = checkpoint / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    _edit(checkpoint, lambda manifest: manifest.update({"state.json": entry(path)}))
    (done,) = moe_ranks(*OVERRIDES, *corpus, f"run_dir={earlier}")
    assert done.code == 2
    assert f"{path}: {key}=" in done.err
    assert len(done.err.splitlines()) == 1
