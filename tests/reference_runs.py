"""Is training bit-identical to that of another checkout? Whole runs of `moe train`, by precision, ZeRO stage and ranks.

    python -m tests.reference_runs record before.json --checkout ../before   # once, in the state to compare with
    python -m tests.reference_runs record after.json
    python -m tests.reference_runs compare before.json after.json            # a table; exit code 1 on any difference

Every loss and gradient norm is compared as the number that metrics.jsonl holds, every tensor of the last checkpoint by
its SHA-256. Both recordings must come from one machine: another CPU rounds otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

OVERRIDES = [
    "model=tiny", "model.vocab_size=512", "model.hidden_size=64", "model.intermediate_size=96",
    "model.num_hidden_layers=2", "model.sliding_window=24", "train.sequence_length=64", "train.micro_batch_size=2",
    "train.global_batch_size=8", "train.steps=6", "train.eval_every=3", "train.eval_sequences=8", "optim.lr=0.01",
    "checkpoint.every=6", "tracking=none", "train.peak_tflops=0.1", "guard.hang_seconds=null",
]  # fmt: skip
RANKS = [(1, 1), (2, 1), (2, 2)]  # (ranks, expert-parallel size)
VARIANTS = {  # more overrides, each on (2, 2) in float32
    "dense": ["model.mlp=dense"],
    "capacity by position": ["router.capacity_factor=1.0"],
    "capacity by probability": ["router.capacity_factor=0.75", "router.drop_policy=probability"],
    "dropout, jitter, recompute=block": [
        "model.hidden_dropout=0.1", "router.jitter_noise=0.1", "model.recompute=block",
    ],
    "loop, recompute=mlp": ["experts.backend=loop", "model.recompute=mlp"],
    "tied embeddings, naive attention": ["model.tie_word_embeddings=true", "model.attention=naive"],
}  # fmt: skip
COMPARED = (
    "loss", "lm_loss", "load_balancing_loss", "router_z_loss", "router_entropy", "max_violation", "dropped_fraction",
    "grad_norm", "lr", "val_loss", "val_bits_per_byte", "expert_shares",
)  # fmt: skip


def cases() -> dict[str, tuple[int, list[str]]]:
    """{name: (ranks, overrides)}."""
    found: dict[str, tuple[int, list[str]]] = {}
    for precision in ("float32", "bfloat16"):
        for stage in (1, 2):
            for ranks, expert in RANKS:
                overrides = [f"train.precision={precision}", f"parallel.zero_stage={stage}", _expert(expert)]
                found[f"{precision}, ZeRO-{stage}, {ranks} ranks, expert-parallel {expert}"] = ranks, overrides
    for name, overrides in VARIANTS.items():
        found[name] = 2, [*overrides, _expert(1 if name == "dense" else 2)]
    found["bfloat16, capacity by position"] = 2, [*VARIANTS["capacity by position"], "train.precision=bfloat16"]
    return found


def _expert(size: int) -> str:
    return f"parallel.expert_parallel_size={size}"


def record(checkout: Path, only: str) -> dict[str, Any]:
    """{case: {"metrics": rows, "tensors": {file's tensor: SHA-256}}} of that checkout's code."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout), "DS_ACCELERATOR": "cpu"}
    help_text = subprocess.run(
        [sys.executable, "-m", "moe", "train", "--cfg", "job"], cwd=checkout, env=environment, capture_output=True,
        text=True, check=True,
    ).stdout  # fmt: skip
    renamed = "expert_parallel_size" in help_text
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (ranks, overrides) in cases().items():
            if only not in name:
                continue
            run_dir = Path(folder, "run" + str(len(results)))
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command += [
                "-m",
                "moe",
                "train",
                *OVERRIDES,
                *overrides,
                f"run_dir={run_dir}",
                f"data.cache_dir={folder}/cache",
            ]
            if not renamed:
                command = [word.replace("expert_parallel_size", "expert") for word in command]
            done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{name}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
            rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            metrics = [{key: row[key] for key in COMPARED if row.get(key) is not None} for row in rows]
            results[name] = {"metrics": metrics, "tensors": _tensors(next((run_dir / "checkpoints").glob("step_*")))}
            print(f"{name}: lm_loss {rows[-1]['lm_loss']!r}", flush=True)
    return results


def _tensors(checkpoint: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  # not a dict
                tensor, metadata = file.get_tensor(key), file.metadata() or {}
                # A slice of an expert's tensor is told from the others by its offsets.
                where = json.loads(metadata.get("DCP_SHARDING_INFO", "{}")).get(key, {})
                digest = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
                hashes[f"{path.parent.name}/{key} {json.dumps(where, sort_keys=True)}"] = digest
    return hashes


def compare(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Prints a table; whether all is equal."""
    print("| run | losses, norms, shares | tensors |\n| --- | --- | --- |")
    equal = before.keys() == after.keys()
    for name in before.keys() & after.keys() if not equal else before:
        old, new = before[name], after[name]
        rows = sum(a == b for a, b in zip(old["metrics"], new["metrics"], strict=True))
        same = sum(new["tensors"].get(key) == digest for key, digest in old["tensors"].items())
        whole = rows == len(old["metrics"]) and same == len(old["tensors"]) == len(new["tensors"])
        equal &= whole
        gap = abs(old["metrics"][-1]["lm_loss"] - new["metrics"][-1]["lm_loss"])
        verdict = "bitwise" if whole else f"**differ** (last lm_loss by {gap:.1e})"
        print(f"| {name} | {rows} of {len(old['metrics'])} steps | {same} of {len(old['tensors'])}: {verdict} |")
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    recorder = verbs.add_parser("record")
    recorder.add_argument("file", type=Path)
    recorder.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parents[1])
    recorder.add_argument("--only", default="", help="cases whose name holds this")
    comparer = verbs.add_parser("compare")
    comparer.add_argument("before", type=Path)
    comparer.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.verb == "record":
        given.file.write_text(json.dumps(record(given.checkout.resolve(), given.only), indent=1))
    elif not compare(json.loads(given.before.read_text()), json.loads(given.after.read_text())):
        sys.exit(1)


if __name__ == "__main__":
    main()
