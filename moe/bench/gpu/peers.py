"""The 3 B model's training step, with fewer layers, beside transformers' Mixtral: `moe bench peers` on the GPU.

Both sides are on the GPU at once, so that rounds can alternate: with all of the model's layers they don't fit.
"""

from __future__ import annotations

import importlib.util
import statistics

from moe.bench import peers
from moe.bench.gpu.models import on_device, step_overrides
from moe.bench.gpu.record import Record
from moe.bench.gpu.settings import Settings
from moe.bench.peer import require_transformers
from moe.bench.settings import Rounds, spread
from moe.distributed import rendezvous
from moe.plan import count_parameters

LAYERS = ["model.num_hidden_layers=6"]  # of 14: 1.4 B parameters
ROUNDS, TINY_ROUNDS = Rounds(rounds=5, steps=3), Rounds(rounds=2, steps=1)


def run(settings: Settings, record: Record) -> None:
    """Raises UserError without transformers, RuntimeError where the sides compute different losses."""
    if settings.dry_run and importlib.util.find_spec("transformers") is None:
        record.headline("not tried: transformers isn't installed")
        return
    require_transformers("gpu")
    overrides = step_overrides(dry_run=settings.dry_run)
    _, config = peers.parse([*overrides, *([] if settings.dry_run else LAYERS)])
    tokens, (total, active) = config.train.global_batch_size * config.train.sequence_length, count_parameters(config)
    record.facts(layers=config.model.num_hidden_layers, parameters=total, active_parameters=active)
    record.facts(tokens_a_step=tokens)
    mesh = rendezvous.start(1)
    try:
        rounds, names = peers.compare(
            TINY_ROUNDS if settings.dry_run else ROUNDS,
            config,
            mesh,
            on_device(config, mesh.device),
            masters_alone=True,
            log=lambda line: record.row("before the rounds", said=line),
        )
    finally:
        rendezvous.stop()
    found = peers.results(config, rounds, names)
    for each in found.tables:
        for row in each.rows:
            record.row("medians of alternating rounds", **dict(zip(["side", *each.columns[1:]], row, strict=True)))
    ratios = [each.speeds["ours"] / each.speeds["peer"] for each in rounds]
    ratio, violation = statistics.median(ratios), rounds[-1].max_violation
    beside = f"{config.model.num_hidden_layers} layers, own routing, MaxVio {violation:.2f}; beside {names['peer']}"
    record.figure("ratio", ratio, f"{beside}; ratio per round {spread(ratios)}")
    record.headline(f"{ratio:.2f} × {names['peer']}, MaxVio {violation:.2f}")
