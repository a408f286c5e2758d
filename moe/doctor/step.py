"""`python -m moe.doctor.step`: two optimizer steps of a tiny model with each engine, which must give the same losses.

DeepSpeed's engine checks whatever it borrows from DeepSpeed's insides (`moe.engine.deepspeed.borrowed`).
"""

from __future__ import annotations

import math
import sys

from moe.bench.stepper import Stepper
from moe.config.compose import load_config
from moe.distributed import rendezvous

TINY = ["model.num_hidden_layers=1", "model.vocab_size=300", "tokenizer.vocab_size=300", "train.sequence_length=32"]
TINY += ["train.micro_batch_size=2", "train.global_batch_size=4"]


def main() -> None:
    losses = {}
    mesh = rendezvous.start(1)
    try:
        for engine in ("plain", "deepspeed"):
            step = Stepper(load_config([*TINY, f"engine={engine}"]), mesh)
            losses[engine] = [step().metrics["lm_loss"] for _ in range(2)]
            print(f"done: engine={engine}", flush=True)
    finally:
        rendezvous.stop()
    close = all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(*losses.values(), strict=True))
    if not close:
        sys.exit(f"the engines' losses differ: {losses}")


if __name__ == "__main__":
    main()
