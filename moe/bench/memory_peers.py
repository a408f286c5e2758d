"""`moe bench memory_peers`: the peak memory of our training step's process beside transformers'.

    moe bench memory_peers                                  # the shape of `moe bench peers`
    moe bench memory_peers rounds=5 precision=bfloat16      # any key of `moe bench peers`

Each side trains `steps` optimizer steps in a process of its own, from the same weights and tokens; its peak is the
largest resident set (VmHWM), libraries included. Rounds alternate which side goes first. The peer is measured with each
of its experts implementations (and, in bfloat16, each arithmetic of `moe.bench.peer`); the smallest peak counts. Those
whose peak is more than `MARGIN` × the smallest in the first round are measured in that one only.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys

from moe.bench import peers
from moe.bench.memory import peak_bytes
from moe.bench.peer import IMPLEMENTATIONS, Arithmetic, Peer, copied_too_large, require_transformers
from moe.bench.results import Cell, Results, ResultTable
from moe.bench.settings import counted
from moe.bench.stepper import Stepper
from moe.config import Config, Precision
from moe.distributed import rendezvous
from moe.model.build import build_model

MARGIN = 1.1  # peaks of one side differ by less between rounds


def run(overrides: list[str]) -> Results:
    """Each side's peak; the last line is `ratio peak memory N.NN`. Raises UserError."""
    keys, config = peers.parse(overrides)
    require_transformers("memory_peers")
    ours = peers.our_name(config)
    sides = [ours, *_peers_of(config)]
    peaks: dict[str, list[int]] = {side: [] for side in sides}
    for index in range(keys.rounds):
        for side in sides[:: -1 if index % 2 else 1]:
            peaks[side].append(_apart(side, overrides))
        if index == 0:
            sides = contenders({side: values[0] for side, values in peaks.items()})
    middle = {side: statistics.median(values) for side, values in peaks.items()}
    rows: list[list[Cell]] = [
        [side, *(round(size / 2**20) for size in (peak, min(peaks[side]), max(peaks[side]))), len(peaks[side])]
        for side, peak in middle.items()
    ]
    least = min(sides[1:], key=lambda side: middle[side])
    return Results(
        [ResultTable(["", "MiB", "least", "most", "rounds"], rows)],
        [f"medians, {counted(keys.steps, 'step')} a round, beside {least}"],
        {"ratio peak memory {}": middle[ours] / middle[least]},
    )


def contenders(peaks: dict[str, int]) -> list[str]:
    """Ours, the first of `peaks`, and the peers whose peak may turn out to be the smallest."""
    ours, *others = peaks
    least = min(peaks[side] for side in others)
    return [ours, *(side for side in others if peaks[side] <= MARGIN * least)]


def _peers_of(config: Config) -> dict[str, tuple[Arithmetic, str]]:
    """{what it is: how the peer computes}."""
    mixed = [Arithmetic.autocast, Arithmetic.master]
    tokens, layers = config.train.micro_batch_size * config.train.sequence_length, config.model.num_hidden_layers
    arithmetics = [Arithmetic.float32] if config.train.precision is Precision.float32 else mixed
    return {
        f"transformers, {implementation}, {arithmetic.value}": (arithmetic, implementation)
        for arithmetic, implementation in itertools.product(arithmetics, IMPLEMENTATIONS)
        if implementation != "batched_mm" or copied_too_large(config, tokens, layers) is None
    }


def _apart(side: str, overrides: list[str]) -> int:
    command = [sys.executable, "-m", "moe.bench.memory_peers", side, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(side: str, overrides: list[str]) -> int:
    """This process's peak, in bytes, after the side's steps."""
    keys, config = peers.parse(overrides)
    mesh = rendezvous.start(1)
    try:
        if side == peers.our_name(config):
            step = Stepper(config, mesh)
            for _ in range(keys.steps):
                step()
        else:
            weights = build_model(config, mesh.device).state_dict()
            peer = Peer(weights, config, *_peers_of(config)[side], mesh.device)
            del weights
            batches = peers.batches_of(config, mesh.device)
            for _ in range(keys.steps):
                peer(batches())
        return peak_bytes(mesh.device)
    finally:
        rendezvous.stop()


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2:])))
