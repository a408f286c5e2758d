"""How fast does the collapse alarm find what breaks, and how often is it wrong? Real runs, healthy and broken.

    python -m tests.alarm_trials run FOLDER            # what is missing in FOLDER, a run after another: an hour
    python -m tests.alarm_trials table FOLDER          # judges their metrics with today's limits
    python -m tests.alarm_trials run FOLDER --only topk --seeds 7      # some of them, another seed

Healthy runs train to the end. A broken run goes on from the checkpoint of a healthy one, breaks before step BROKEN_AT
and trains TAIL steps more; only "no balance" is broken from its first step. docs/diagnostics.md says which
limits were chosen on seeds 0 and 1 alone.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.checkpoint.state import TrainState
from moe.config.compose import load_config
from moe.config.train import AlarmConfig
from moe.sparse import SparseMLP
from moe.train import loop
from moe.train.alarm import Alarm
from moe.train.setup import TrainingRun
from tests.bias_router.router import install

STEPS, SAVED_AT, BROKEN_AT, TAIL = 400, 250, 261, 60
LAYER, EXPERT = 1, 2  # what is broken
CHOSEN_ON = (0, 1)  # the seeds that limits were chosen on
SIZE = [
    "model=tiny", "model.vocab_size=512", "model.hidden_size=64", "model.intermediate_size=96",
    "model.num_hidden_layers=2", "model.num_attention_heads=4", "model.num_key_value_heads=2", "model.head_dim=null",
    "train.sequence_length=128", "train.micro_batch_size=4", "train.global_batch_size=4", "optim.lr=2e-3",
    f"train.steps={STEPS}", "train.eval_every=25", "train.eval_sequences=32", "train.sample_every=100000",
    "engine=plain", "tracking=none", "train.peak_tflops=0.1", "guard.hang_seconds=null", "guard.max_skipped=100",
    f"checkpoint.every={SAVED_AT}", "checkpoint.background=false",
]  # fmt: skip
FINE = ["model.intermediate_size=32"]
HEALTHY = {
    "topk 2 of 8": ["router.aux_loss_coef=0.02"],
    "topk 2 of 8, capacity 1": ["router.aux_loss_coef=0.01", "router.capacity_factor=1.0"],
    "topk 2 of 8, jitter": ["router.aux_loss_coef=0.01", "router.jitter_noise=0.1"],
    "topk 8 of 32": ["router.num_experts=32", "router.top_k=8", "router.aux_loss_coef=0.01", *FINE],
    "topk 8 of 64": ["router.num_experts=64", "router.top_k=8", "router.aux_loss_coef=0.01", *FINE],
    "bias 2 of 8": ["router=bias", "router.rate=0.01"],
    "bias 2 of 8, slow": ["router=bias", "router.rate=0.001"],
    "lossfree": ["router=lossfree"],
    "gumbel": ["router=gumbel", "router.aux_loss_coef=0.01"],
    "noisy top-k": ["router=noisy_topk", "router.aux_loss_coef=0.01"],
    "groups": ["router=deepseek_v3", "router.num_experts=16", "router.n_group=4", "router.topk_group=2",
               "router.top_k=4", "model.moe_intermediate_size=48", "model.n_shared_experts=1"],
    "switch": ["router=switch", "router.num_experts=8"],
    "expert choice": ["router=expert_choice"],
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Break:
    """`before` is done to the model before step BROKEN_AT; after each step from then on, routers move `pace` times as
    far as the optimizer moved them. `overrides` change what the resumed run trains with."""

    healthy: str
    overrides: tuple[str, ...] = ()
    before: Callable[[TrainingRun], None] | None = None
    pace: float = 1.0


def _layer(run: TrainingRun) -> SparseMLP:
    return [module for module in run.engine.model.modules() if isinstance(module, SparseMLP)][LAYER]


@torch.no_grad()
def attract_all(run: TrainingRun) -> None:
    """One row of a router becomes so similar to what all tokens have in common that every token chooses it."""
    layer, means = _layer(run), list[Tensor]()
    hook = layer.gate.register_forward_pre_hook(lambda _, inputs: means.append(inputs[0].flatten(0, 1).mean(0)))
    batch = run.loader.next_step()[0]
    run.loader.consumed = run.state.consumed
    run.engine.model(batch.input_ids_BS, document_ids_BS=batch.document_ids_BS)
    hook.remove()
    layer.gate.get_parameter("weight")[EXPERT] = 30 * means[0] / means[0].square().mean().sqrt() / len(means[0]) ** 0.5


def scale_expert(factor: float) -> Callable[[TrainingRun], None]:
    @torch.no_grad()
    def scale(run: TrainingRun) -> None:
        _layer(run).experts.down_proj[EXPERT] *= factor

    return scale


NONE = ("router.aux_loss_coef=0", "router.z_loss_coef=0")
BROKEN = {
    "a router row attracts all": Break("topk 2 of 8", before=attract_all),
    "a router row attracts all, 8 of 32": Break("topk 8 of 32", before=attract_all),
    "router learning rate × 50": Break("topk 2 of 8", pace=50),
    "no balance loss, router learning rate × 10": Break("topk 2 of 8", NONE, pace=10),
    "bias rate 1": Break("bias 2 of 8", ("router.rate=1",)),
    "expert zeroed": Break("topk 2 of 8", before=scale_expert(0)),
    "expert output × 30": Break("topk 2 of 8", before=scale_expert(30)),
    "expert output × 30, loss-free": Break("bias 2 of 8", before=scale_expert(30)),
    "expert NaN": Break("topk 2 of 8", before=scale_expert(math.nan)),
}
FROM_THE_START = {
    "no balance from step 0": list(NONE),
    "no balance from step 0, initializer=normal": [*NONE, "model.initializer=normal"],
}


def _folder(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(' ', '_').replace(',', '').replace('×', 'x')}-{seed}"


class Enough(Exception):
    """The broken run has shown what it had to."""


def _trial(folder: Path, name: str, seed: int) -> None:
    """One run in this process, whose metrics stay in FOLDER."""
    install()
    run_dir = _folder(folder, name, seed)
    common = [*SIZE, f"train.seed={seed}", f"run_dir={run_dir}"]
    broken = BROKEN.get(name)
    if broken is None:
        loop.train(load_config([*common, *(HEALTHY | FROM_THE_START)[name]]))
        return
    healthy = _folder(folder, broken.healthy, seed)
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(
        healthy, run_dir, ignore=lambda _, names: [n for n in names if n == "done" or n.endswith(f"{STEPS:08d}")]
    )
    (run_dir / "checkpoints" / "latest").write_text(f"step_{SAVED_AT:08d}\n")
    step = loop._step
    routers: list[nn.Parameter] = []

    def breaking(run: TrainingRun) -> Any:
        if run.state.step == BROKEN_AT + TAIL:
            raise Enough
        if run.state.step == BROKEN_AT - 1:
            routers.extend(p for name, p in run.engine.model.named_parameters() if ".gate." in name)
            if broken.before is not None:
                broken.before(run)
        update = run.engine.step

        def faster(*inputs: Any) -> Any:
            before = [p.detach().clone() for p in routers]
            result = update(*inputs)
            with torch.no_grad():
                for parameter, old in zip(routers, before, strict=True):
                    parameter += (broken.pace - 1) * (parameter - old)
            return result

        run.engine.step = faster  # type: ignore[method-assign]
        try:
            return step(run)
        finally:
            run.engine.step = update  # type: ignore[method-assign]

    loop._step = breaking
    try:
        changed = [*HEALTHY[broken.healthy], *broken.overrides, "checkpoint.allow_changes=true"]
        loop.train(load_config([*common, *changed]))
    except Enough:
        pass
    shutil.rmtree(run_dir / "checkpoints")


def _read(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:  # null stands for what JSON doesn't have
        if "expert_output_norm" in row:
            norms_LE = row["expert_output_norm"]
            row["expert_output_norm"] = [[math.inf if x is None else x for x in norms_E] for norms_E in norms_LE]
        for name in ("load_concentration_layers", "router_entropy_of_mean_layers"):
            row[name] = [math.nan if x is None else x for x in row[name]]
    return rows


def alarms(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every alarm of a run's metrics under today's limits, with the step at which it began. What the run found in its
    weights, which metrics don't show, is as it was."""
    judge, found = Alarm(AlarmConfig(), TrainState(), range(100), lambda _: None), []
    for row in rows:
        known = row.get("new_alarms", [])
        weights = [(one["layer"], one["expert"]) for one in known if one["metric"] == "expert_weights"]
        found += [one | {"step": row["step"]} for one in judge.judge(row, weights).get("new_alarms", [])]
    return found


def _run(folder: Path, only: str, seeds: list[int]) -> None:
    for name in [*HEALTHY, *FROM_THE_START, *BROKEN]:
        for seed in seeds:
            done = _folder(folder, name, seed) / "done"
            if only not in name or done.exists():
                continue
            command = [sys.executable, "-m", "tests.alarm_trials", "trial", str(folder), "--only", name]
            result = subprocess.run([*command, "--seeds", str(seed)], capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(f"{name}, seed {seed}:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
            done.touch()
            print(f"{name}, seed {seed}: {alarms(_read(done.parent))[:2]}", flush=True)


def _table(folder: Path) -> None:
    chosen = dict[str, list[tuple[int, list[dict[str, Any]], float]]]()
    for done in sorted(folder.glob("*/done")):
        rows = _read(done.parent)
        seed = int(done.parent.name.rpartition("-")[2])
        name = next(n for n in [*HEALTHY, *FROM_THE_START, *BROKEN] if _folder(folder, n, seed) == done.parent)
        largest = max(max(row["load_concentration_layers"]) for row in rows if row["step"] > 220)
        chosen.setdefault(name, []).append((seed, alarms(rows), largest))
    for title, kept in (
        ("seeds that limits were chosen on", lambda seed: seed in CHOSEN_ON),
        ("other seeds", lambda seed: seed not in CHOSEN_ON),
    ):
        seeds = sorted({seed for runs in chosen.values() for seed, *_ in runs if kept(seed)})
        print(f"\n{title}: {', '.join(map(str, seeds))}\n")
        print("| healthy run | false alarms | largest load concentration after step 220 |\n| --- | --- | --- |")
        for name in HEALTHY:
            runs = [run for run in chosen.get(name, []) if run[0] in seeds]
            wrong = [f"{a['metric']} (layer {a['layer']}, step {a['step']})" for _, found, _ in runs for a in found]
            bad = sum(bool(found) for _, found, _ in runs)
            tops = ", ".join(f"{top:.2f}" for *_, top in runs)
            print(f"| {name} | {bad} of {len(runs)}{': ' if wrong else ''}{'; '.join(wrong[:3])} | {tops} |")
        print("\n| broken run | found | steps until the alarm | by, on layer, expert |\n| --- | --- | --- | --- |")
        for name in [*FROM_THE_START, *BROKEN]:
            runs = [run for run in chosen.get(name, []) if run[0] in seeds]
            changed = name in BROKEN and BROKEN[name].overrides  # broken as soon as it goes on
            from_step = 1 if name in FROM_THE_START else SAVED_AT + 1 if changed else BROKEN_AT
            firsts = [next((a for a in found if a["step"] >= from_step), None) for _, found, _ in runs]
            steps = [first["step"] - from_step + 1 for first in firsts if first is not None]
            found = [a for a in firsts if a is not None]
            by = sorted({f"{a['metric']} {a['layer']}, {'–' if a['expert'] is None else a['expert']}" for a in found})
            middle = f"{statistics.median(steps):g} ({min(steps)}–{max(steps)})" if steps else "–"
            print(f"| {name} | {len(steps)} of {len(runs)} | {middle} | {'; '.join(by)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "trial", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="trials whose name holds this")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    given = parser.parse_args()
    if given.verb == "table":
        _table(given.folder)
    elif given.verb == "trial":
        _trial(given.folder, given.only, given.seeds[0])
    else:
        _run(given.folder, given.only, given.seeds)


if __name__ == "__main__":
    main()
