"""The cases of each area. A generator gets a seeded `random.Random`, a folder to write and a finished run."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from moe.config.presets import groups, presets
from tests.e2e.conftest import SMALL
from tests.fuzz.data_areas import rows, tokenizer, tree
from tests.fuzz.mutate import ODD, mutated, odd
from tests.fuzz.run import OUTSIDE, Case

ONE_STEP = [*SMALL, "train.steps=1", "optim.warmup_steps=0", "train.eval_sequences=2", "engine=plain"]
KEYS = [
    "run_dir", "model", "model.hidden_size", "model.vocab_size", "model.head_dim", "model.rope_theta", "router.top_k",
    "router.capacity_factor", "router.aux_loss_coef", "router.kind", "optim.lr", "optim.betas", "optim.schedule",
    "optim.max_grad_norm", "train.seed", "train.steps", "train.micro_batch_size", "train.global_batch_size",
    "train.sequence_length", "train.precision", "train.sample_prompt", "data", "data.path", "data.text_field",
    "data.held_out", "data.cache_dir", "data.format", "data.sources", "tokenizer", "tokenizer.path",
    "tokenizer.vocab_size", "checkpoint.every", "checkpoint.keep", "init_from", "parallel.zero_stage",
    "parallel.expert_parallel_size", "guard.spike_sigmas", "guard.hang_seconds", "tracking.name", "engine",
]  # fmt: skip
VERBS = ["train", "plan", "prepare", "generate", "report", "analyze", "bench", "ls", "cp", "doctor", "completion"]
VARIABLES = [
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MOE_START_TIMEOUT",
    "OMP_NUM_THREADS", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_INIT_TIMEOUT", "NETRC", "TMPDIR", "HOME", "COLUMNS",
]  # fmt: skip


def _misspelt(random_: random.Random, text: str) -> str:
    at = random_.randrange(len(text) + 1)
    return (
        text[:at] + random_.choice(["", "x", ".", "=", text[at : at + 1] * 2, "_"]) + text[at + random_.randrange(2) :]
    )


def command_line(random_: random.Random, folder: Path, done: Path) -> Case:
    """A verb with known, misspelt and odd keys, values, presets and options; nothing that trains for long."""
    del folder, done
    verb = random_.choice(VERBS)
    words = []
    for _ in range(random_.randrange(4)):
        key = random_.choice(KEYS)
        group = random_.choice(groups())
        misspelt, sign = _misspelt(random_, key), random_.choice(["+", "~", "++", ""])
        options = ["--cfg", "--help", "--config-dir", "--json", "-x", "job", odd(random_)]
        forms = [f"{key}={odd(random_)}", f"{sign}{misspelt}={random_.choice(['1', odd(random_)])}"]
        forms += [f"{group}={random_.choice([*presets(group), odd(random_)])}", random_.choice(options)]
        words.append(random_.choice(forms))
    if random_.random() < 0.1:
        verb = _misspelt(random_, verb)
    if verb in ("train", "prepare", "plan", "generate", "analyze"):
        words += ["--cfg", "job"]  # composes and checks; what runs is the other areas'
    if verb in ("bench", "doctor"):
        words.insert(0, odd(random_))
    return Case("command line", f"{verb} {' '.join(words)}"[:200], [verb, *words])


def environment(random_: random.Random, folder: Path, done: Path) -> Case:
    """One training step with odd variables."""
    del folder
    chosen = {
        random_.choice(VARIABLES): random_.choice([*ODD, "1", "2", "3", "65536", "1e3", "127.0.0.1", "offline"])
        for _ in range(random_.choice([1, 1, 2, 3]))
    }
    usable = {name: value.replace("\0", "") for name, value in chosen.items() if "\ud800" not in value}
    arguments = ["train", *ONE_STEP, *_corpus(done), "run_dir=run"]
    timeout = {"MOE_START_TIMEOUT": "1", "WANDB_INIT_TIMEOUT": "1"}
    return Case("environment", str(usable)[:200], arguments, timeout | usable)


def _corpus(done: Path) -> list[str]:
    return [
        "data=files",
        f"data.path={done.parent / 'text'}",
        "data.held_out=0.2",
        f"data.cache_dir={done.parent / 'cache'}",
    ]


def run_directory(random_: random.Random, folder: Path, done: Path) -> Case:
    """Someone else's run directory, given to report, generate, train or init_from. Its manifests mostly
    list the changed files as they are."""
    run_dir = folder / "run"
    shutil.copytree(done, run_dir)
    files = [path for path in run_dir.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    picked = random_.sample(files, random_.choice([1, 1, 2]))
    for path in picked:
        _change(random_, path)
    if random_.random() < 0.8:
        for manifest in sorted(run_dir.glob("checkpoints/*/manifest.json")):
            if manifest not in picked:
                _list_anew(manifest)
    verb = random_.choice(["report", "generate", "train", "init_from"])
    train = ["train", *ONE_STEP, *_corpus(done), "train.steps=3"]
    arguments = {
        "report": ["report", "run"],
        "generate": ["generate", "checkpoint=run", "prompt=one", "max_new_tokens=3"],
        "train": [*train, "run_dir=run", "checkpoint.allow_changes=true"],
        "init_from": [*train, "run_dir=new", "init_from=run"],
    }[verb]
    names = [str(path.relative_to(run_dir)) for path in picked]
    return Case("run directory", f"{verb} {names}", arguments, {"SECRET": SECRET}, never=SECRET)


SECRET = "a-secret-of-the-environment"
CONTENTS = [
    b"", b"{", b"[]", b"{}", b"null", b"3", b"\xff\xfe", b"[" * 5000, b"{" * 5000, b'{"a":' * 3000, b"9" * 6000,
    b"a: &a [*a]", b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", b"a: " + b"[" * 500, b"run_dir: ${oc.env:SECRET}",
    b"!!python/object/apply:os.getcwd []", b'{"file": "/dev/zero"}', b'{"file": "../../metrics.jsonl"}',
]  # fmt: skip
ODD_LEAVES = [
    None, True, False, -1, 0, 1.5, 2**53, 10**30, 10**400, 1e300, 1e999, float("nan"), "", "x", "/dev/zero", "../..",
    "${oc.env:SECRET}", "\ud800", [], [[]], {}, {"a": {"a": 1}}, [1] * 1000,
]  # fmt: skip


def _change(random_: random.Random, path: Path) -> None:
    """Other bytes, an odd value somewhere inside, or no regular file at all."""
    match random_.randrange(9):
        case 0:
            path.write_bytes(mutated(random_, path.read_bytes()))
        case 1:
            path.write_bytes(random_.choice(CONTENTS))
        case 2:
            path.unlink()
            path.mkdir()
        case 3:
            path.unlink()
            path.symlink_to(random_.choice(["/dev/zero", _outside(path), "/etc/hostname", "."]))
        case 4:
            path.unlink()
            os.mkfifo(path)
        case 5:
            path.write_text(_odd_value(random_, path.read_text(errors="replace")), errors="replace")
        case _:
            _odd_leaf(random_, path)


def _outside(path: Path) -> Path:
    """A file that isn't there, beside the run directory that `path` is in: no command may make it."""
    (run_dir,) = (folder for folder in path.parents if folder.name == "run")
    return run_dir.with_name(OUTSIDE)


def _odd_leaf(random_: random.Random, path: Path) -> None:
    """One value of a JSON or YAML file replaced, or its key removed."""
    content = path.read_text(errors="replace")
    lines = content.splitlines() if path.suffix == ".jsonl" else [content]
    at = random_.randrange(max(1, len(lines)))
    load, dump = (yaml.safe_load, yaml.safe_dump) if path.suffix == ".yaml" else (json.loads, json.dumps)
    try:
        tree = load(lines[at])
    except (ValueError, IndexError):
        return
    place, key = _random_leaf(random_, tree)
    if place is None:
        return
    if random_.random() < 0.2:
        del place[key]
    else:
        place[key] = random_.choice(ODD_LEAVES)
    lines[at] = dump(tree)
    path.write_text("\n".join(lines) + "\n", errors="surrogatepass")


def _random_leaf(random_: random.Random, tree: Any) -> tuple[Any, Any]:
    place, key = None, None
    while isinstance(tree, dict | list) and tree and (place is None or random_.random() < 0.8):
        place, key = tree, random_.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        tree = place[key]
    return place, key


def _list_anew(manifest: Path) -> None:
    """Gives the files that are there the sizes and hashes that they have now."""
    entries = json.loads(manifest.read_text())
    for name in entries:
        path = manifest.parent / name
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            entries[name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    manifest.write_text(json.dumps(entries))


def _odd_value(random_: random.Random, text: str) -> str:
    """Text with one number or word replaced by an odd value."""
    words = text.split(" ")
    at = random_.randrange(len(words))
    words[at] = random_.choice([odd(random_), json.dumps(odd(random_)), "-5", "1e999", "NaN", "Infinity"])
    return " ".join(words)


def checkpoint(random_: random.Random, folder: Path, done: Path) -> Case:
    """Changed shards, with a manifest that hides the change or doesn't; damage that the manifest shows must fail."""
    run_dir = folder / "run"
    shutil.copytree(done, run_dir)
    for older in sorted((run_dir / "checkpoints").glob("step_*"))[:-1]:
        shutil.rmtree(older)
    (step,) = (run_dir / "checkpoints").glob("step_*")
    shard = random_.choice(sorted((step / "model").iterdir()))
    content = shard.read_bytes()
    changed = mutated(random_, content) if random_.random() < 0.6 else _odd_floats(random_, content)
    shard.write_bytes(changed)
    hidden = random_.random() < 0.6
    if hidden:
        manifest = json.loads((step / "manifest.json").read_text())
        manifest[f"model/{shard.name}"] = {"bytes": len(changed), "sha256": sha256(changed).hexdigest()}
        (step / "manifest.json").write_text(json.dumps(manifest))
    arguments = ["generate", "checkpoint=run", "prompt=one", "max_new_tokens=3"]
    must_fail = changed != content and not hidden
    return Case("checkpoint", f"{shard.name}, {'hidden' if hidden else 'shown'}", arguments, must_fail=must_fail)


def _odd_floats(random_: random.Random, content: bytes) -> bytes:
    """NaN, infinity or a huge number in the tensors of a safetensors file."""
    (header,) = struct.unpack("<Q", content[:8])
    start = 8 + header
    at = start + 4 * random_.randrange(max(1, (len(content) - start) // 4))
    value = struct.pack("<f", random_.choice([float("nan"), float("inf"), 3e38, -3e38]))
    return content[:at] + value + content[at + 4 :]


AREAS: dict[str, Callable[[random.Random, Path, Path], Case]] = {
    "command line": command_line,
    "environment": environment,
    "tokenizer": tokenizer,
    "rows": rows,
    "folders": tree,
    "run directory": run_directory,
    "checkpoint": checkpoint,
}
SHARES = {
    "command line": 8,
    "environment": 2,
    "tokenizer": 3,
    "rows": 4,
    "folders": 2,
    "run directory": 3,
    "checkpoint": 1,
}
