"""The cases of each area. A generator gets a seeded `random.Random`, a folder to write and a finished run."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from moe.config.presets import groups, presets
from tests.e2e.conftest import SMALL
from tests.fuzz.run import Case

ONE_STEP = [*SMALL, "train.steps=1", "optim.warmup_steps=0", "train.eval_sequences=2", "engine=plain"]
ODD = [
    "", " ", "0", "-1", "1e308", "-1e308", "nan", "inf", "1e-320", str(2**63), str(2**64), "9" * 6000, "null", "true",
    "[]", "{}", "[1,2", "'", '"', "\\", "${x}", "${oc.env:HOME}", "a,b", "(", "é", "日本", "\u202e", "a b", "../..",
    "/", "/dev/zero", "/dev/null", "~", "*", "$(id)", "x" * 5000, "\ud800", "a=b", "1_000", "0x10", "+5", "None", "\t",
]  # fmt: skip
KEYS = [
    "run_dir", "model", "model.hidden_size", "model.vocab_size", "model.head_dim", "model.rope_theta", "router.top_k",
    "router.capacity_factor", "router.aux_loss_coef", "router.kind", "optim.lr", "optim.betas", "optim.schedule",
    "optim.max_grad_norm", "train.seed", "train.steps", "train.micro_batch_size", "train.global_batch_size",
    "train.sequence_length", "train.precision", "train.sample_prompt", "data", "data.path", "data.text_field",
    "data.held_out", "data.cache_dir", "data.format", "data.sources", "tokenizer", "tokenizer.path",
    "tokenizer.vocab_size", "checkpoint.every", "checkpoint.keep", "checkpoint.init_from", "parallel.zero_stage",
    "parallel.expert_parallel_size", "guard.spike_sigmas", "guard.hang_seconds", "tracking.name", "engine",
]  # fmt: skip
VERBS = ["train", "plan", "prepare", "generate", "report", "analyze", "bench", "ls", "cp", "doctor", "completion"]
VARIABLES = [
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MOE_START_TIMEOUT",
    "OMP_NUM_THREADS", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_INIT_TIMEOUT", "NETRC", "TMPDIR", "HOME", "COLUMNS",
]  # fmt: skip


def _odd(random_: random.Random) -> str:
    return random_.choice(ODD)


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
        options = ["--cfg", "--help", "--config-dir", "--json", "-x", "job", _odd(random_)]
        forms = [f"{key}={_odd(random_)}", f"{sign}{misspelt}={random_.choice(['1', _odd(random_)])}"]
        forms += [f"{group}={random_.choice([*presets(group), _odd(random_)])}", random_.choice(options)]
        words.append(random_.choice(forms))
    if random_.random() < 0.1:
        verb = _misspelt(random_, verb)
    if verb in ("train", "prepare", "plan", "generate", "analyze"):
        words += ["--cfg", "job"]  # composes and checks; what runs is the other areas'
    if verb in ("bench", "doctor"):
        words.insert(0, _odd(random_))
    return Case("command line", f"{verb} {' '.join(words)}"[:200], [verb, *words])


def environment(random_: random.Random, folder: Path, done: Path) -> Case:
    """One training step with odd variables."""
    del folder
    odd = {
        random_.choice(VARIABLES): random_.choice([*ODD, "1", "2", "3", "65536", "1e3", "127.0.0.1", "offline"])
        for _ in range(random_.choice([1, 1, 2, 3]))
    }
    usable = {name: value.replace("\0", "") for name, value in odd.items() if "\ud800" not in value}
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


def _mutated(random_: random.Random, content: bytes) -> bytes:
    """A few bytes changed, cut, repeated, inserted or swapped."""
    data = bytearray(content)
    for _ in range(random_.choice([1, 1, 2, 8])):
        at = random_.randrange(len(data) + 1)
        size = random_.choice([1, 1, 4, 64, len(data) // 3 + 1])
        match random_.randrange(6):
            case 0:
                data[at : at + 1] = bytes([random_.randrange(256)])
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size]
            case 3:
                data[at:at] = random_.randbytes(min(size, 64))
            case 4:
                data[at : at + size] = b"\0" * min(size, 64)
            case 5:
                data = data[:at]
    return bytes(data)


def tokenizer(random_: random.Random, folder: Path, done: Path) -> Case:
    """A SentencePiece model or a tokenizer.json with changed bytes."""
    if random_.random() < 0.6:
        name, kind = "t.model", "model_file"
        content = (done.parent / "tokenizer.model").read_bytes()
        path = folder / name
    else:
        name, kind = "tokenizer.json", "huggingface"
        content = (done.parent / "tokenizer.json").read_bytes()
        path = folder
    (folder / name).write_bytes(_mutated(random_, content))
    words = [f"tokenizer={kind}", f"tokenizer.path={path}", "model.vocab_size=100000"]
    return Case("tokenizer", kind, ["prepare", *_corpus(done)[:3], "data.cache_dir=cache", *words])


def rows(random_: random.Random, folder: Path, done: Path) -> Case:
    """JSONL, Parquet, CSV and text with odd rows or changed bytes."""
    suffix = random_.choice([".jsonl", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", ".json"])
    if suffix == ".parquet":
        content = _mutated(random_, (done.parent / "rows.parquet").read_bytes())
    elif random_.random() < 0.5:
        content = _mutated(random_, (done.parent / "rows.jsonl").read_bytes())
    else:
        lines = []
        for _ in range(random_.randrange(30)):
            text = random_.choice([*ODD, "some plain text of a few words " * 5])
            key = random_.choice(["text", "text", "body", _odd(random_)])
            row = random_.choice(
                [json.dumps({key: text}), json.dumps([text]), text, f'{{"text": {"9" * 6000}}}', "[" * 3000]
            )
            lines.append(row.replace("\n", " "))
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
    path = folder / f"rows{suffix}"
    path.write_bytes(content)
    field = random_.choice([[], [], ["data.text_field=body"]])
    words = ["data=files", f"data.path={path}", *field, "data.cache_dir=cache", "tokenizer.vocab_size=300"]
    return Case("rows", suffix, ["prepare", *words])


def run_directory(random_: random.Random, folder: Path, done: Path) -> Case:
    """Someone else's run directory, given to report, generate or train."""
    run_dir = folder / "run"
    shutil.copytree(done, run_dir)
    files = [path for path in run_dir.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    for path in random_.sample(files, random_.choice([1, 1, 2])):
        match random_.randrange(5):
            case 0:
                path.write_bytes(_mutated(random_, path.read_bytes()))
            case 1:
                path.write_bytes(
                    random_.choice([b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b"a: &a [*a]", b"[" * 5000])
                )
            case 2:
                path.unlink()
                path.mkdir()
            case 3:
                path.unlink()
                path.symlink_to(random_.choice(["/dev/zero", "/nowhere", "/etc/hostname", "."]))
            case 4:
                path.write_text(_odd_value(random_, path.read_text(errors="replace")), errors="replace")
    verb = random_.choice(["report", "generate", "train"])
    arguments = {
        "report": ["report", "run"],
        "generate": ["generate", "checkpoint=run", "prompt=one", "max_new_tokens=3"],
        "train": ["train", *ONE_STEP, *_corpus(done), "run_dir=run", "train.steps=3", "checkpoint.allow_changes=true"],
    }[verb]
    return Case("run directory", f"{verb} {[str(path.relative_to(run_dir)) for path in files[:1]]}", arguments)


def _odd_value(random_: random.Random, text: str) -> str:
    """Text with one number or word replaced by an odd value."""
    words = text.split(" ")
    at = random_.randrange(len(words))
    words[at] = random_.choice([_odd(random_), json.dumps(_odd(random_)), "-5", "1e999", "NaN", "Infinity"])
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
    changed = _mutated(random_, content) if random_.random() < 0.6 else _odd_floats(random_, content)
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
    "run directory": run_directory,
    "checkpoint": checkpoint,
}
SHARES = {"command line": 8, "environment": 2, "tokenizer": 3, "rows": 3, "run directory": 3, "checkpoint": 1}
