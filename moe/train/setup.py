"""Everything that a training run is made of, put together: data, model, engine, and what the run directory holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe.checkpoint import reader as checkpoints
from moe.checkpoint.state import TrainState
from moe.checkpoint.writer import Saver
from moe.config import Config
from moe.config.compose import to_yaml
from moe.data.corpus import Corpus, check_vocab
from moe.data.loader import Loader, held_out_batches
from moe.data.prepare import prepare
from moe.distributed.collective_timing import CollectiveTiming, host_names
from moe.distributed.mesh import Mesh
from moe.durable import write_durably
from moe.engine import build_engine
from moe.engine import prepare as prepare_engine
from moe.engine.base import Engine
from moe.errors import UserError
from moe.model.build import build_model
from moe.plan import flops_per_token
from moe.train import run_directory
from moe.train.evaluate import Evaluation
from moe.train.guard import Guard
from moe.train.progress import Display
from moe.train.signals import StopSignals
from moe.train.startup import choose_backends, describe_run, peak_flops
from moe.train.straggler import Straggler
from moe.train.tracking import Tracker, cut_back
from moe.train.watchdog import Watchdog


@dataclass(slots=True)
class TrainingRun:
    """Everything that a training run is made of, on one rank."""

    config: Config
    mesh: Mesh
    folder: Path
    display: Display
    corpus: Corpus
    engine: Engine
    loader: Loader
    evaluation: Evaluation
    saver: Saver
    state: TrainState
    guard: Guard
    collective_timing: CollectiveTiming
    straggler: Straggler
    stop: StopSignals
    watchdog: Watchdog
    flops_per_token: float
    peak_flops: float
    tracker: Tracker | None = None  # rank 0's


def set_up(config: Config, mesh: Mesh, folder: Path, display: Display) -> TrainingRun:
    """A fresh run, or one that goes on from the newest whole checkpoint. A collective. Raises UserError."""
    quiet = display.line if mesh.is_main else _silent
    corpus = mesh.agree(lambda: prepare(config.data, config.tokenizer, log=quiet), "data")
    mesh.agree(lambda: check_vocab(corpus, config.model.vocab_size), "data")
    train, world = config.train, mesh.world_size
    loader = mesh.agree(
        lambda: Loader(
            corpus,
            sequence_length=train.sequence_length,
            micro_batch_size=train.micro_batch_size,
            global_batch_size=train.global_batch_size,
            rank=mesh.rank,
            world_size=world,
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
            rank=mesh.rank,
            world_size=world,
        ),
        "data",
    )
    checkpoint = checkpoints.newest(folder, mesh, display.warn)
    changes = mesh.agree(lambda: _changes(checkpoint, corpus, config) if checkpoint else [], "resume")

    mesh = prepare_engine(config, mesh)
    model = build_model(config, mesh.device, mesh.expert_group)
    backends = mesh.agree(lambda: choose_backends(config, mesh), "back-ends")
    peak = peak_flops(config, mesh)
    engine = build_engine(model, config, mesh)
    state = TrainState(tokenizer=corpus.tokenizer.fingerprint, data=corpus.fingerprint)
    for line in (*corpus.describe().splitlines(), *describe_run(config, mesh, peak), *backends):
        display.line(line)
    if checkpoint is not None:
        fresh, state = state, checkpoints.load(checkpoint, engine, mesh)
        state.data, state.versions = fresh.data, fresh.versions
        loader.consumed = state.consumed
        display.line(f"resuming from {checkpoint} (step {state.step}, {state.tokens:,} tokens)")
        for line in changes:
            display.warn(f"changed since then: {line}")
    watchdog = Watchdog(mesh, config.guard.hang_seconds)
    run = TrainingRun(
        config=config,
        mesh=mesh,
        folder=folder,
        display=display,
        corpus=corpus,
        engine=engine,
        loader=loader,
        evaluation=Evaluation(corpus, held_out, mesh, config.model.vocab_size),
        saver=Saver(
            folder,
            mesh,
            config.checkpoint,
            display.line,
            display.warn,
            lambda doing: watchdog.beat(state.step, doing, long=True),
        ),
        state=state,
        guard=Guard(config.guard, state, mesh, display.warn),
        collective_timing=CollectiveTiming(mesh),
        straggler=Straggler(host_names(world), display.warn),
        stop=StopSignals(speaks=mesh.is_main),
        watchdog=watchdog,
        flops_per_token=flops_per_token(config),
        peak_flops=peak,
    )
    if state.step < train.steps:  # a finished run stays as it is
        mesh.agree(lambda: _write_run_files(run, resumed=checkpoint is not None), "run_dir")
    return run


def _silent(_: str) -> None:
    """Ranks other than the first leave the talking to it."""


def _changes(checkpoint: Path, corpus: Corpus, config: Config) -> list[str]:
    """What is not as it was when `checkpoint` was written. Raises UserError for what can't go on."""
    then = checkpoints.read_state(checkpoint)
    tokenizer, now = corpus.tokenizer.fingerprint, TrainState().versions
    if then.tokenizer != tokenizer:
        raise UserError(
            f"tokenizer fingerprint {tokenizer[:12]} differs from {then.tokenizer[:12]} in {checkpoint}: "
            "the same ids would mean other text; use the run's own tokenizer or another run_dir"
        )
    lines = run_directory.check_resumable(checkpoint, config, (then.data, corpus.fingerprint))
    return lines + [f"{name}: {old} → {now[name]}" for name, old in then.versions.items() if now.get(name, old) != old]


def _write_run_files(run: TrainingRun, *, resumed: bool) -> None:
    if not run.mesh.is_main:
        return
    write_durably(run.folder / "config.yaml", to_yaml(run.config))
    run.corpus.tokenizer.save(run.folder / "tokenizer")
    for name in ("metrics.jsonl", "samples.jsonl"):
        cut_back(run.folder / name, run.state.step)
    run.tracker = Tracker(run.config, run.folder, resumed=resumed, warn=run.display.warn)
