"""Opens a run's data and builds its model and engine, from the configuration alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from moe.config import Config
from moe.data.corpus import Corpus, check_vocab
from moe.data.loader import Batch, Loader, held_out_batches
from moe.data.prepare import prepare
from moe.distributed.mesh import Mesh
from moe.engine import build_engine
from moe.engine import prepare as prepare_engine
from moe.engine.base import Engine
from moe.engine.parameters import freeze
from moe.model.build import build_model
from moe.model.transformer import Transformer
from moe.sparse.routers.base import routers_of
from moe.train.progress import Display
from moe.train.startup import choose_backends, describe_run, peak_flops, time_experts


@dataclass(frozen=True, slots=True)
class Data:
    """The corpus, this rank's training batches, and its share of the held-out ones."""

    corpus: Corpus
    loader: Loader
    held_out: list[Batch]


def open_data(config: Config, mesh: Mesh, display: Display) -> Data:
    """Token shards that don't exist yet are prepared first. A collective. Raises UserError."""
    log, warn = (display.line, display.warn) if mesh.is_main else (_silent, partial(_warn, mesh))
    length = config.train.sequence_length
    corpus = mesh.agree(
        lambda: prepare(config.data, config.tokenizer, sequence_length=length, log=log, warn=warn), "data"
    )
    mesh.agree(lambda: check_vocab(corpus, config.model.vocab_size), "data")
    train = config.train
    loader = mesh.agree(
        lambda: Loader(
            corpus,
            sequence_length=train.sequence_length,
            micro_batch_size=train.micro_batch_size,
            global_batch_size=train.global_batch_size,
            rank=mesh.data_parallel_rank,
            world_size=mesh.data_parallel_size,
            seed=train.seed,
        ),
        "data",
    )
    held_out = mesh.agree(
        lambda: held_out_batches(
            corpus,
            sequence_length=train.sequence_length,
            micro_batch_size=train.micro_batch_size,
            max_sequences=train.eval_sequences,
            rank=mesh.data_parallel_rank,
            world_size=mesh.data_parallel_size,
        ),
        "data",
    )
    return Data(corpus, loader, held_out)


def build(
    config: Config,
    corpus: Corpus,
    mesh: Mesh,
    display: Display,
    complete: Callable[[Transformer, Mesh], None] = lambda model, mesh: None,
) -> tuple[Mesh, Engine, float]:
    """The mesh with the engine's groups, the engine around a new model, and a rank's peak FLOP/s; tells what they are.

    `complete` is called with the new model before an engine has it, to add adapters. A collective. Raises UserError.
    """
    mesh = prepare_engine(config, mesh)
    model = mesh.agree(lambda: build_model(config, mesh.device, mesh.expert_group), "model")
    complete(model, mesh)
    mesh.agree(lambda: freeze(model, config.optim), "model")
    time_experts(config, mesh)
    backends = mesh.agree(lambda: choose_backends(config, mesh), "back-ends")
    if not all(router.keeps_balance for router in routers_of(model)):
        display.warn_on_stderr(
            f"router.kind={config.router.kind}: trains unbalanced, as its configuration says: no balance loss and no "
            "bias keeps the experts in use"
        )
    if not model.is_causal:
        display.warn_on_stderr(
            f"router.kind={config.router.kind}: in training a token's experts depend on later tokens of its sequence, "
            "so the loss is too low; val_loss reads the routers causally, val_loss_leaky as trained; no text is sampled"
        )
    peak = peak_flops(config, mesh)
    engine = build_engine(model, config, mesh)
    for line in (*corpus.describe().splitlines(), *describe_run(config, mesh, peak), *backends):
        display.line(line)
    return mesh, engine, peak


def _silent(_: str) -> None:
    """Only rank 0 prints."""


def _warn(mesh: Mesh, text: str) -> None:
    """A line that only this rank has."""
    print(f"[rank {mesh.rank} of {mesh.world_size}] warning: {text}", file=sys.stderr, flush=True)
