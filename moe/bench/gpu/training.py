"""`moe train` in bfloat16, as a user runs it: one whole run, and one resumed from the first checkpoint.

The resumed run must write the same losses as the whole one. The trained model's logits and loss are compared with those
of the same weights in float32 on the CPU.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from moe.bench.gpu import data
from moe.bench.gpu.measure import device_of, relative_error
from moe.bench.gpu.record import Record
from moe.bench.gpu.settings import Settings
from moe.checkpoint.reader import load_model, resolve

STEPS, TINY_STEPS = 80, 4
SMALL = ["model=small", "train.sequence_length=512", "train.micro_batch_size=16", "train.global_batch_size=32"]
TINY = [
    "model=tiny", "model.vocab_size=4096", "model.hidden_size=32", "model.intermediate_size=48",
    "model.num_hidden_layers=2", "train.sequence_length=32", "train.micro_batch_size=2", "train.global_batch_size=4",
    "train.peak_tflops=0.1",
]  # fmt: skip
# On a GPU the order of some sums (the embedding's gradient) varies, so that two runs slowly diverge.
SAME_LOSS = 1e-2
LOGITS = {torch.float32: 5e-3, torch.bfloat16: 1e-1}  # bfloat16 may choose another expert when two are nearly equal


def run(settings: Settings, record: Record) -> None:
    """Raises RuntimeError when a run of `moe train` fails or writes no metrics."""
    steps = TINY_STEPS if settings.dry_run else STEPS
    overrides = [*(TINY if settings.dry_run else SMALL), *data.overrides(data.find_or_write(settings))]
    overrides += [
        "train.precision=bfloat16",
        "optim.schedule=constant",
        f"train.steps={steps}",
        "train.eval_sequences=16",
    ]
    overrides += [f"train.eval_every={steps}", f"train.sample_every={steps}", "train.sample_tokens=8", "tracking=none"]
    overrides += [f"checkpoint.every={steps // 2}", "checkpoint.keep=2"]
    whole, resumed = (Path(settings.work) / name for name in ("whole", "resumed"))
    said = _train(overrides, whole)
    for line in said.splitlines():
        name, _, rest = line.strip().partition(": ")
        if name in ("attention", "experts", "memory", "peak", "model", "ranks"):
            record.facts(**{name: rest})
    metrics = _metrics(whole)
    _record_speed(record, metrics)

    shutil.copytree(whole, resumed)
    for later in sorted((resumed / "checkpoints").glob("step_*"))[1:]:
        shutil.rmtree(later)
    said = _train(overrides, resumed)
    if "resuming from" not in said:
        raise RuntimeError(f"the second run did not resume:\n{said[-2000:]}")
    again = _metrics(resumed)
    gaps = [abs(a["lm_loss"] / b["lm_loss"] - 1) for a, b in zip(again, metrics, strict=True)]
    record.facts(resumed_from_step=steps // 2, resumed_losses_bit_identical="yes" if max(gaps) == 0 else "no")
    record.check("resumed losses, largest relative difference", max(gaps), SAME_LOSS)
    _compare_with_float32(record, whole, settings)


def _train(overrides: list[str], run_dir: Path) -> str:
    """Runs `moe train`; returns what it printed."""
    command = [sys.executable, "-m", "moe", "train", *overrides, f"run_dir={run_dir}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, flush=True)
    if done.returncode:
        raise RuntimeError(f"moe train ended with {done.returncode}")
    return done.stdout


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _record_speed(record: Record, metrics: list[dict[str, Any]]) -> None:
    late = metrics[len(metrics) // 4 :]  # warm
    speed, mfu = (statistics.median(each[name] for each in late) for name in ("tokens_per_second", "mfu"))
    first, last = metrics[0]["lm_loss"], metrics[-1]["lm_loss"]
    record.facts(tokens_per_second=round(speed), mfu=mfu, first_loss=first, last_loss=last, steps=len(metrics))
    record.facts(MaxVio=metrics[-1]["max_violation"])
    record.check("skipped steps", metrics[-1]["skipped_steps"], 0)
    record.headline(f"{speed:,.0f} tokens/s, MFU {mfu:.1%}, loss {first:.3f} → {last:.3f}")


@torch.no_grad()
def _compare_with_float32(record: Record, run_dir: Path, settings: Settings) -> None:
    """Compares the checkpoint's model on the device, in two precisions, with float32 on the CPU."""
    device, folder = device_of(settings), resolve(run_dir)
    reference = load_model(folder).float().cpu().eval()
    ids_BS = torch.randint(320, (2, 32 if settings.dry_run else 256), generator=torch.Generator().manual_seed(0))
    wanted = reference(ids_BS).logits_BSV
    loss = float(reference(ids_BS, labels_BS=ids_BS).lm_loss_sum)
    for dtype, limit in LOGITS.items():
        model = load_model(folder).to(device, dtype).eval()
        ids = ids_BS.to(device)
        error = relative_error([model(ids).logits_BSV.float().cpu()], [wanted])
        found = float(model(ids, labels_BS=ids).lm_loss_sum)
        name = str(dtype).removeprefix("torch.")
        record.row("against float32 on the CPU", dtype=name, logits=error, loss=abs(found / loss - 1))
        record.check(f"{name}, relative error of the logits", error, limit)
