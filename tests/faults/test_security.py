"""A file that runs code when it is unpickled is put wherever a run reads a file: its code must never run.

Each case must also end with one line and a nonzero exit code, or continue without the file. The payload creates a file,
and the first test shows that unpickling it would.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from moe.cli import main as cli
from tests.e2e.conftest import SMALL, Run
from tests.faults.forked import Finished, moe_ranks

pytestmark = pytest.mark.fault(12)
SHORT = [*SMALL, "train.eval_every=100", "train.sample_every=100", "train.steps=2"]


class _Payload:
    """Unpickling it creates the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self._marker, "w")


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("marker") / "the payload ran"


@pytest.fixture(scope="module")
def payloads(marker: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The payload as a plain pickle, as torch.save writes it, and as an array of objects."""
    folder = tmp_path_factory.mktemp("payloads")
    torch.save(_Payload(marker), folder / "torch")
    np.save(folder / "array.npy", np.array([_Payload(marker)], dtype=object), allow_pickle=True)
    return {
        "pickle": pickle.dumps(_Payload(marker)),
        "torch": (folder / "torch").read_bytes(),
        "numpy": (folder / "array.npy").read_bytes(),
    }


@pytest.fixture(autouse=True)
def _never(marker: Path) -> Any:
    marker.unlink(missing_ok=True)
    yield
    assert not marker.exists(), "the payload ran"


def test_the_payload_would_run(payloads: dict[str, bytes], marker: Path, tmp_path: Path) -> None:
    loads: dict[str, Callable[[Path], Any]] = {
        "pickle": lambda path: pickle.loads(path.read_bytes()),
        "torch": lambda path: torch.load(path, weights_only=False),
        "numpy": lambda path: np.load(path, allow_pickle=True),
    }
    for name, load in loads.items():
        (tmp_path / name).write_bytes(payloads[name])
        load(tmp_path / name)
        assert marker.exists(), name
        marker.unlink()


def _main(overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Finished:
    """Runs `moe OVERRIDES` in this process: none of these commands starts ranks."""
    monkeypatch.setattr(sys, "argv", ["moe", *overrides])
    code = 0
    try:
        cli.main()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    return Finished(code, *capsys.readouterr())


def _assert_one_line(done: Finished, text: str) -> None:
    """Asserts exit code 2 and one line that contains `text`."""
    assert done.code == 2, done.err
    lines = [line for line in done.err.splitlines() if line.startswith("moe:")]
    assert len(lines) == 1, done.err
    assert text in lines[0]
    assert "Traceback" not in done.err


@pytest.fixture(scope="module")
def trained(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    (done,) = moe_ranks("train", f"run_dir={folder}", *corpus, *SHORT)
    assert done.code == 0, done.err
    return folder


def _put(checkpoint: Path, name: str, payload: bytes) -> None:
    """Replaces one file by `payload` and updates its size and hash in the manifest, as an attacker could."""
    (checkpoint / name).write_bytes(payload)
    path = checkpoint / "manifest.json"
    if name != path.name:
        manifest = json.loads(path.read_text())
        manifest[name] = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
        path.write_text(json.dumps(manifest))


def test_as_each_file_of_a_checkpoint(
    trained: Path,
    payloads: dict[str, bytes],
    marker: Path,
    tmp_path: Path,
    corpus: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outcome: Callable[[str], None],
) -> None:
    names = sorted(str(p.relative_to(trained)) for p in trained.glob("checkpoints/step_*/**/*") if p.is_file())
    inside = [name.split("/", 2)[2] for name in names]
    small = {"config.yaml", "manifest.json", "state.json", "tokenizer/tokenizer.model", "tokenizer/moe_tokenizer.json"}
    assert small < set(inside)
    assert sum(name.endswith(".safetensors") for name in inside) >= 2
    (optimizer, *_) = [name for name in inside if name.startswith("optimizer/")]
    # All other files are read by the same functions in training and in `moe generate`.
    in_training = [[optimizer], ["model/.metadata", "optimizer/.metadata", "manifest.json"]]
    for number, replaced in enumerate([[name] for name in inside] + in_training):
        run = tmp_path / str(number)
        shutil.copytree(trained, run)
        (checkpoint,) = (run / "checkpoints").glob("step_*")
        for name in replaced:
            _put(checkpoint, name, payloads["torch" if number % 2 else "pickle"])
        if number < len(inside):
            done = _main(["generate", f"checkpoint={run}", "prompt=3", "max_new_tokens=2"], monkeypatch, capsys)
            read = not name.startswith("optimizer/")
        else:
            (done,) = moe_ranks("train", f"run_dir={run}", *corpus, *SHORT, "train.steps=3")
            read = True  # a run whose only checkpoint is damaged doesn't start over
            assert ("passed over: manifest.json" in done.out) == (
                "manifest.json" in replaced
            )  # .metadata is never read
        if read:
            _assert_one_line(done, str(run))
        else:
            assert done.code == 0, done.err
        assert not marker.exists(), replaced
    outcome(f"each of {len(inside)} checkpoint files, with a matching manifest: rejected in one line where it is read")


@pytest.mark.parametrize(
    "yaml",
    [
        "train: !!python/object/apply:os.system ['touch {marker}']",
        "train: !!python/object/new:os.system ['touch {marker}']",
        "model:\n  _target_: os.system\n  command: touch {marker}",
        'train:\n  steps: ${{eval:\'open("{marker}", "w")\'}}',
    ],
    ids=["apply", "new", "_target_", "resolver"],
)
def test_code_in_a_checkpoints_config(
    yaml: str,
    trained: Path,
    marker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    _put(checkpoint, "config.yaml", yaml.format(marker=marker).encode())
    overrides = ["generate", f"checkpoint={tmp_path / 'run'}", "prompt=3", "max_new_tokens=2"]
    _assert_one_line(_main(overrides, monkeypatch, capsys), str(checkpoint / "config.yaml"))


def test_as_a_tokenizer(
    trained: Path,
    payloads: dict[str, bytes],
    corpus: list[str],
    marker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outcome: Callable[[str], None],
) -> None:
    data = [override for override in corpus if not override.startswith("data.cache_dir=")] + [
        f"data.cache_dir={tmp_path / 'new'}"
    ]
    folder = tmp_path / "folder"
    folder.mkdir()
    bare = tmp_path / "tokenizer.model"
    for name, payload in payloads.items():
        bare.write_bytes(payload)
        for kind in ("model_file", "huggingface"):
            overrides = ["prepare", *data, f"tokenizer={kind}", f"tokenizer.path={bare}"]
            _assert_one_line(_main(overrides, monkeypatch, capsys), str(bare))
        for file_name in ("tokenizer.json", "tokenizer.model"):
            (folder / file_name).write_bytes(payload)
            overrides = ["prepare", *data, "tokenizer=huggingface", f"tokenizer.path={folder}"]
            _assert_one_line(_main(overrides, monkeypatch, capsys), str(folder))
            (folder / file_name).unlink()
        assert not marker.exists(), name
    # Files that transformers would run or unpickle beside a valid tokenizer.json are ignored or rejected.
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenization_evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (folder / "vocab.pkl").write_bytes(payloads["pickle"])
    remote = {"eos_token": "</s>", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(remote))
    overrides = ["prepare", *data, "tokenizer=huggingface", f"tokenizer.path={folder}"]
    assert _main(overrides, monkeypatch, capsys).code in (0, 2)
    assert not marker.exists()
    # A run of before: its tokenizer is beside its checkpoints, in no manifest.
    for name in ("tokenizer.model", "moe_tokenizer.json"):
        run = tmp_path / f"run with {name}"
        shutil.copytree(trained, run)
        (checkpoint,) = (run / "checkpoints").glob("step_*")
        (checkpoint / "tokenizer").rename(run / "tokenizer")
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest = {key: entry for key, entry in manifest.items() if not key.startswith("tokenizer/")}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        (run / "tokenizer" / name).write_bytes(payloads["pickle"])
        _assert_one_line(
            _main(["generate", f"checkpoint={run}", "prompt=3"], monkeypatch, capsys), str(run / "tokenizer")
        )
    outcome("as a tokenizer model, tokenizer.json, a folder with code, a run's own tokenizer: rejected or never read")


def _as_data(folder: Path, payloads: dict[str, bytes], marker: Path) -> dict[str, tuple[list[str], bool]]:
    """By name: the overrides that give the payload as data, and whether they must be rejected."""
    payload = payloads["pickle"]
    suffixes = (".pkl", ".pickle", ".pt", ".pth", ".npy", ".npz", ".bin", ".joblib", ".parquet", ".jsonl", ".arrow")
    offered: dict[str, tuple[list[str], bool]] = {}
    for suffix in (*suffixes, ".txt", ".tar", ".jsonl.gz"):
        path = folder / f"data{suffix}"
        kind = {".pt": "torch", ".pth": "torch", ".npy": "numpy", ".npz": "numpy"}.get(suffix, "pickle")
        path.write_bytes(payloads[kind])
        if suffix == ".jsonl.gz":
            path.write_bytes(gzip.compress(payload))
        offered[suffix] = [f"data.path={path}"], True
    # Formats of `datasets`: a loading script, members of a tar, and Arrow's own pickled extension type.
    script = folder / "script"
    script.mkdir()
    (script / "script.py").write_text(f"open({str(marker)!r}, 'w')\n")
    offered["script"] = [f"data.path={script}", "data.format=dataset"], True
    offered["script file"] = [f"data.path={script / 'script.py'}", "data.format=dataset"], True
    web = folder / "web"
    web.mkdir()
    for name, data in (("0.pkl", payload), ("0.pth", payloads["torch"]), ("0.npy", payloads["numpy"])):
        (web / name).write_bytes(data)
    with tarfile.open(web / "train.tar", "w") as tar:
        for name in ("0.pkl", "0.pth", "0.npy"):
            tar.add(web / name, name)
            (web / name).unlink()
    offered["tar"] = [f"data.path={web}", "data.format=dataset"], True
    field = pyarrow.field("text", pyarrow.string(), metadata={
        b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload,
    })  # fmt: skip
    rows = pyarrow.table([["some text of a row\n"] * 200], schema=pyarrow.schema([field]))
    pyarrow.parquet.write_table(rows, folder / "extension.parquet")
    offered["extension"] = [f"data.path={folder / 'extension.parquet'}", "tokenizer.vocab_size=280"], False
    saved = folder / "saved"
    saved.mkdir()
    for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        (saved / name).write_bytes(payload)
    offered["saved"] = [f"data.path={saved}"], True
    return offered


def test_as_data(
    payloads: dict[str, bytes],
    marker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outcome: Callable[[str], None],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    offered = _as_data(tmp_path / "data", payloads, marker)
    for name, (overrides, rejected) in offered.items():
        overrides = ["prepare", "data=files", *overrides, f"data.cache_dir={tmp_path / 'cache'}"]
        done = _main(overrides, monkeypatch, capsys)
        assert not marker.exists(), name
        if rejected:
            _assert_one_line(done, "data")
        else:
            assert done.code in (0, 2), (name, done.err)
    outcome(
        f"as data in {len(offered)} forms (pickles, arrays, Parquet, tar, a loading script): rejected or never read"
    )


def test_as_a_file_of_the_shards(
    corpus: list[str],
    payloads: dict[str, bytes],
    marker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A damaged cache is prepared again from the text."""
    data = [override for override in corpus if not override.startswith("data.cache_dir=")] + [
        f"data.cache_dir={tmp_path}"
    ]
    overrides = ["prepare", *data, "tokenizer.vocab_size=300"]
    assert _main(overrides, monkeypatch, capsys).code == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert {"meta.json", "documents.bin", "tokenizer.model"} < {path.name for path in files}
    for path in files:
        path.write_bytes(payloads["pickle"])
        done = _main(overrides, monkeypatch, capsys)
        assert not marker.exists(), path
        assert done.code == 0, (path, done.err)


TARGET = "_target_:builtins.open,file:'{marker}',mode:w"
OVERRIDES = {
    "in a group": ["+model={" + TARGET + "}"],
    "in a value": ["train={" + TARGET + "}"],
    "in a new value": ["+train.x={" + TARGET + "}"],
    "in a source": ["+data.sources.x={" + TARGET + "}"],
    "at the top": ["+_target_=builtins.open", "+file={marker}", "+mode=w"],
    "key by key": ["+model._target_=builtins.open", "+model.file={marker}", "+model.mode=w"],
    "Hydra's callback": ["+hydra.callbacks.x={" + TARGET + "}"],
    "Hydra's launcher": ["hydra.launcher._target_=builtins.open"],
    "Hydra's search path": ["hydra.searchpath=[file://{folder}]", "+experiment=evil"],
    "a group's file elsewhere": ["model=../../../../../../../..{folder}/evil"],
    "another folder of files": ["--config-dir={folder}", "experiment=evil"],
    "a resolver": ['train.steps=${{eval:\'open("{marker}","w")\'}}'],
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_target_in_an_override(
    name: str,
    marker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outcome: Callable[[str], None],
) -> None:
    for folder in (tmp_path, tmp_path / "experiment"):
        folder.mkdir(exist_ok=True)
        (folder / "evil.yaml").write_text(f"model:\n  _target_: builtins.open\n  file: {marker}\n  mode: w\n")
    overrides = [text.replace("{marker}", str(marker)).replace("{folder}", str(tmp_path)) for text in OVERRIDES[name]]
    overrides = [text.replace("{{", "{").replace("}}", "}") for text in overrides]
    done = _main(["train", *overrides], monkeypatch, capsys)
    assert done.code == 2, done.out
    assert done.err.startswith("moe: ")
    assert len(done.err.splitlines()) == 1, done.err
    outcome(f"`_target_` in {len(OVERRIDES)} kinds of override: rejected")


def test_in_a_process_of_its_own(moe: Run, payloads: dict[str, bytes], tmp_path: Path) -> None:
    """The command as users run it: one line, exit code 2."""
    path = tmp_path / "corpus.pkl"
    path.write_bytes(payloads["pickle"])
    done = moe("prepare", "data=files", f"data.path={path}", f"data.cache_dir={tmp_path / 'cache'}")
    _assert_one_line(Finished(done.returncode, done.stdout, done.stderr), f"{path}: .pkl files may be pickles")
