"""A sweep's folder as `moe sweep` leaves it, without training anything."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path


def write_sweep(folder: Path, points: int = 8, seeds: int = 3, steps: int = 60) -> Path:
    """The loss falls with the coefficient's distance from 0.01; the seed moves it by some hundredths."""
    chance = random.Random(0)
    trials, number = [], 0
    for index in range(points):
        coefficient, scoring = 10 ** chance.uniform(-4, -1), ("softmax", "sigmoid", "plain")[index % 3]
        for seed in range(seeds):
            noise = 0.02 * seed + 0.002 * chance.uniform(-1, 1)
            loss = 5 + 0.05 * abs(math.log10(coefficient) + 2) + noise
            violation = 1.5 - 0.3 * (math.log10(coefficient) + 4) + 0.05 * chance.uniform(-1, 1)
            params = {"router.aux_loss_coef": coefficient, "router.scoring<": scoring}
            run_dir = folder / "trials" / f"{number:04d}"
            run_dir.mkdir(parents=True)
            rows = [
                {"step": step, "max_violation": violation + 2 * math.exp(-step / 10) + 0.1 * chance.uniform(-1, 1)}
                for step in range(1, steps + 1)
            ]
            (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6')
            trials.append(
                {
                    "trial": number, "params": params, "seed": seed, "state": "COMPLETE", "error": "", "seconds": 20.0,
                    "metrics": {"val_loss": loss, "max_violation": violation}, "run_dir": f"trials/{number:04d}",
                    "command": ["model=tiny", f"router.aux_loss_coef={coefficient}", f"train.seed={seed}"],
                }
            )  # fmt: skip
            number += 1
    trials.append(
        {**trials[0], "trial": number, "state": "FAIL", "error": "exit code 1: <out of memory>", "metrics": {}}
    )
    described = {
        "objectives": ["val_loss", "max_violation"], "maximize": [], "seeds": seeds, "sampler": "tpe", "steps": steps,
        "trials_asked": 30, "names": ["router.aux_loss_coef", "router.scoring<"], "log": ["router.aux_loss_coef"],
        "importance": {
            "val_loss": {"router.aux_loss_coef": 0.9, "router.scoring<": 0.1},
            "max_violation": {"router.aux_loss_coef": 0.7, "router.scoring<": 0.3},
        },
    }  # fmt: skip
    (folder / "trials.json").write_text(json.dumps(described | {"trials": trials}))
    return folder
