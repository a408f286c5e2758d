"""Puts a training run together: builds it (`build`), fills it from a checkpoint (`resume`), and watches it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe.checkpoint.state import TrainState
from moe.checkpoint.writer import Saver
from moe.config import Config
from moe.config.compose import to_yaml
from moe.config.rules import require
from moe.config.run import PROFILED
from moe.data.corpus import Corpus
from moe.data.loader import Loader
from moe.distributed.code import running_code
from moe.distributed.collective_timing import CollectiveTiming, host_names
from moe.distributed.mesh import Mesh
from moe.durable import write_durably
from moe.engine.base import Engine
from moe.model.transformer import Transformer
from moe.plan import count_parameters, flops_per_token
from moe.sparse import SparseMLP
from moe.train.alarm import Alarm
from moe.train.answers import Answers
from moe.train.best import Best
from moe.train.build import Data, build, open_data
from moe.train.evaluate import Evaluation
from moe.train.guard import Guard
from moe.train.profile import StepProfiler
from moe.train.progress import Display
from moe.train.resume import complete_model, find_start, load_start
from moe.train.signals import StopSignals
from moe.train.startup import check_backends, choose_backends
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
    answers: Answers | None
    saver: Saver
    state: TrainState
    guard: Guard
    alarm: Alarm
    best: Best
    collective_timing: CollectiveTiming
    straggler: Straggler
    hosts: list[str]  # by rank
    stop: StopSignals
    watchdog: Watchdog
    flops_per_token: float
    peak_flops: float
    profiler: StepProfiler | None = None
    tracker: Tracker | None = None  # rank 0's


def set_up(config: Config, mesh: Mesh, folder: Path, display: Display) -> TrainingRun:
    """A fresh run, or one that continues from the newest whole checkpoint. A collective. Raises UserError."""
    mesh.agree(lambda: check_backends(config, mesh.device), "back-ends")
    data = open_data(config, mesh, display)
    steps = config.train.steps_for(data.loader.epoch_samples)
    config = replace(config, train=replace(config.train, steps=steps, epochs=None))
    display.steps = steps
    start = find_start(config, folder, data.corpus, mesh, display)
    mesh, engine, peak = build(config, data.corpus, mesh, display, partial(complete_model, start, config))
    state = load_start(start, folder, engine, data.corpus, mesh, display)
    data.loader.consumed = state.consumed
    run = watch(config, mesh, folder, display, data, engine, state, peak)
    if state.step < config.train.steps:  # a finished run stays as it is
        mesh.agree(lambda: _write_run_files(run, resumed=start.resumed is not None), "run_dir")
    return run


def watch(
    config: Config,
    mesh: Mesh,
    folder: Path,
    display: Display,
    data: Data,
    engine: Engine,
    state: TrainState,
    peak: float,
) -> TrainingRun:
    """Adds evaluation, saves, guard, straggler, signals and watchdog to the run. A collective."""
    watchdog = Watchdog(mesh, config.guard.hang_seconds)

    def beat(doing: str) -> None:
        watchdog.beat(state.step, doing, long=True)

    answers = Answers.of(config, data.corpus, mesh)
    if answers is not None:
        causal = _transformer(engine).is_causal
        require(causal, f"train.answer_metrics: a model with router.kind={config.router.kind} can't generate text")
        display.line(answers.describe())
    hosts = host_names(mesh.world_size)
    saver = Saver(folder, mesh, config.checkpoint, display.line, display.warn, beat, data.corpus.tokenizer)
    return TrainingRun(
        config=config,
        mesh=mesh,
        folder=folder,
        display=display,
        corpus=data.corpus,
        engine=engine,
        loader=data.loader,
        evaluation=Evaluation(data.corpus, data.held_out, mesh, config.model.vocab_size),
        answers=answers,
        saver=saver,
        state=state,
        guard=Guard(config.guard, state, mesh, display.warn),
        alarm=Alarm(config.alarm, state, _sparse_layers(engine), display.warn),
        best=Best(config.checkpoint, state),
        collective_timing=CollectiveTiming(mesh, enabled=config.guard.name_stragglers),
        straggler=Straggler(hosts, display.warn),
        hosts=hosts,
        stop=StopSignals(prints=mesh.is_main),
        watchdog=watchdog,
        flops_per_token=flops_per_token(config),
        peak_flops=peak,
        profiler=_profiler(config, mesh, folder, display, engine, state.step) if config.profile else None,
    )


def _profiler(
    config: Config, mesh: Mesh, folder: Path, display: Display, engine: Engine, step: int
) -> StepProfiler | None:
    left = config.train.steps - step
    if 0 < left < PROFILED[-1]:
        display.warn(f"profile=true: not profiled, {left} steps are left, and the first {PROFILED[-1]} would be needed")
    return StepProfiler(engine, mesh, folder, display.line) if left >= PROFILED[-1] else None


def _transformer(engine: Engine) -> Transformer:
    assert isinstance(engine.model, Transformer)
    return engine.model


def _sparse_layers(engine: Engine) -> list[int]:
    """The numbers of the blocks whose MLP is sparse."""
    layers = _transformer(engine).model.layers
    return [layer for layer, block in enumerate(layers) if isinstance(block.mlp, SparseMLP)]


def _write_run_files(run: TrainingRun, *, resumed: bool) -> None:
    if not run.mesh.is_main:
        return
    write_durably(run.folder / "config.yaml", to_yaml(run.config))
    for name in ("metrics.jsonl", "samples.jsonl"):
        cut_back(run.folder / name, run.state.step)
    run.tracker = Tracker(run.config, run.folder, resumed=resumed, warn=run.display.warn, facts=_facts(run))


def _facts(run: TrainingRun) -> dict[str, Any]:
    """What a run is besides its configuration, for the tracker."""
    config, mesh = run.config, run.mesh
    parameters, active = count_parameters(config)
    return {
        "code": running_code(),
        "hosts": run.hosts,
        "ranks": mesh.world_size,
        "ranks_per_node": mesh.local_world_size,
        "device": mesh.device.type,
        "gpu": torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else None,
        "parameters": parameters,
        "active_parameters": active,
        "flops_per_token": run.flops_per_token,
        "peak_flops_per_rank": run.peak_flops,
        "first_step": run.state.step + 1,
        "data": run.corpus.describe(),
        "tokenizer": run.state.tokenizer,
        "back_ends": choose_backends(config, mesh),
    }
