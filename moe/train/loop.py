"""`moe train`: from a checked configuration to a trained model, or from where the run directory stands.

    moe train                                                   # one process
    torchrun --nproc-per-node 2 -m moe train parallel.expert=2  # two, experts split over both

One step: loader → model → language-model and balance losses → engine → figures. The language-model loss is the sum over
the target tokens of the step's whole global batch divided by their number, so it doesn't depend on how many ranks or
micro-batches the batch is cut into; balance losses are means over micro-batches.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe.compose import to_yaml
from moe.config import Config, Mlp
from moe.data.loader import Batch, Loader, held_out_batches
from moe.data.prepare import Corpus, check_vocab, prepare
from moe.dist import topology as topology_module
from moe.dist.checkpoint import Checkpoints, TrainState, write_durably
from moe.dist.engine import Engine, StepResult, expert_groups
from moe.dist.topology import Topology
from moe.generate import sample_text
from moe.model.transformer import Transformer
from moe.plan import flops_per_token
from moe.report.page import write_report
from moe.sparse import Randomness
from moe.sparse.balance import balance_loss
from moe.train import rundir
from moe.train.evaluate import Evaluation
from moe.train.metrics import StepSums
from moe.train.optim import learning_rate
from moe.train.progress import Display
from moe.train.startup import choose_backends, describe_run, peak_flops
from moe.train.tracking import Tracker, cut_back


@dataclass(slots=True)
class Run:
    """Everything that a training run is made of, on one rank."""

    config: Config
    topology: Topology
    folder: Path
    display: Display
    corpus: Corpus
    engine: Engine
    loader: Loader
    evaluation: Evaluation
    checkpoints: Checkpoints
    state: TrainState
    flops_per_token: float
    peak_flops: float
    tracker: Tracker | None = None  # rank 0's


def train(config: Config) -> None:
    """Runs to `train.steps`. Raises ValueError with one line for the user."""
    topology = topology_module.start(config.parallel.expert, rundir.flatten(config))
    try:
        display = Display(is_main=topology.is_main, steps=config.train.steps, log_every=config.train.log_every)
        folder = Path(config.run_dir)
        held = topology.agree(lambda: rundir.lock(folder) if topology.is_main else None, "run_dir")
        try:
            run = _set_up(config, topology, folder, display)
            if run.state.step >= config.train.steps:
                display.line(f"{folder} is finished at step {run.state.step}; a larger train.steps goes on from there")
                return
            _loop(run)
        finally:
            if held is not None:
                held.close()
    finally:
        topology_module.stop()


def _set_up(config: Config, topology: Topology, folder: Path, display: Display) -> Run:
    quiet = display.line if topology.is_main else _silent
    corpus = topology.agree(lambda: prepare(config.data, config.tokenizer, log=quiet), "data")
    topology.agree(lambda: check_vocab(corpus, config.model.vocab_size), "data")
    train, world = config.train, topology.world_size
    loader = topology.agree(
        lambda: Loader(
            corpus,
            sequence_length=train.sequence_length,
            micro_batch_size=train.micro_batch_size,
            global_batch_size=train.global_batch_size,
            rank=topology.rank,
            world_size=world,
            seed=train.seed,
        ),
        "data",
    )
    held_out = topology.agree(
        lambda: held_out_batches(
            corpus,
            sequence_length=train.sequence_length,
            micro_batch_size=train.micro_batch_size,
            max_sequences=train.eval_sequences,
            rank=topology.rank,
            world_size=world,
        ),
        "data",
    )
    checkpoints = Checkpoints(folder, topology, config.checkpoint.keep)
    checkpoint = checkpoints.newest(display.warn)
    changes = topology.agree(lambda: rundir.check_resumable(checkpoint, config) if checkpoint else [], "resume")

    expert_group, _ = expert_groups(topology)
    model = Transformer(config.model, config.router, config.experts, expert_group=expert_group)
    model.init_weights(train.seed)
    model.to(topology.device)
    backends = topology.agree(lambda: choose_backends(config, topology), "back-ends")
    peak = peak_flops(config, topology)
    engine = Engine(model, config, topology)
    state = TrainState(tokenizer=corpus.tokenizer.fingerprint, data=corpus.fingerprint)
    for line in (*corpus.describe().splitlines(), *describe_run(config, topology, peak), *backends):
        display.line(line)
    if checkpoint is not None:
        data, tokenizer = state.data, state.tokenizer
        state = topology.agree(lambda: checkpoints.load(checkpoint, engine), "resume")
        _check_data(state, data, tokenizer, checkpoint, display)
        loader.consumed = state.consumed
        display.line(f"resuming from {checkpoint} (step {state.step}, {state.tokens:,} tokens)")
        for line in changes:
            display.warn(f"changed since then: {line}")
    run = Run(
        config=config,
        topology=topology,
        folder=folder,
        display=display,
        corpus=corpus,
        engine=engine,
        loader=loader,
        evaluation=Evaluation(corpus, held_out, topology, config.model.vocab_size),
        checkpoints=checkpoints,
        state=state,
        flops_per_token=flops_per_token(config),
        peak_flops=peak,
    )
    topology.agree(lambda: _write_run_files(run, resumed=checkpoint is not None), "run_dir")
    return run


def _silent(_: str) -> None:
    """Ranks other than the first leave the talking to it."""


def _check_data(state: TrainState, data: str, tokenizer: str, checkpoint: Path, display: Display) -> None:
    if state.tokenizer != tokenizer:
        raise ValueError(
            f"tokenizer fingerprint {tokenizer[:12]} differs from {state.tokenizer[:12]} in {checkpoint}: "
            "the same ids would mean other text; use the run's own tokenizer or another run_dir"
        )
    if state.data != data:
        display.warn(f"the data changed since {checkpoint}: its fingerprint was {state.data[:12]}, is {data[:12]}")


def _write_run_files(run: Run, *, resumed: bool) -> None:
    if not run.topology.is_main:
        return
    write_durably(run.folder / "config.yaml", to_yaml(run.config))
    run.corpus.tokenizer.save(run.folder / "tokenizer")
    for name in ("metrics.jsonl", "samples.jsonl"):
        cut_back(run.folder / name, run.state.step)
    run.tracker = Tracker(run.config, run.folder, resumed=resumed, warn=run.display.warn)


def _loop(run: Run) -> None:
    config, state, train = run.config, run.state, run.config.train
    run.display.start(state.step)
    unsaved = False
    try:
        while state.step < train.steps:
            figures = _step(run)
            last = state.step == train.steps
            if state.step % train.eval_every == 0 or last:
                figures |= _evaluate(run)
            if run.tracker is not None:
                run.tracker.log(figures)
            run.display.step(figures)
            if state.step % train.sample_every == 0 or last:
                _sample(run)
            if state.step % config.checkpoint.every == 0 or last:
                unsaved = not _save(run)
    finally:
        run.display.stop()
        if run.tracker is not None:
            run.tracker.close()
    if run.topology.is_main:
        run.display.line(f"report: {write_report(run.folder)}")
    if unsaved:
        raise ValueError(f"{run.folder}: training finished, but the last checkpoint could not be saved (see above)")


def _step(run: Run) -> dict[str, Any]:
    """One optimizer step over the next global batch; its figures."""
    started = time.perf_counter()
    config, topology, state = run.config, run.topology, run.state
    batches = run.loader.next_step()
    targets = _global_targets(batches, topology)
    micro_batches = len(batches) * topology.world_size
    lr = learning_rate(config.optim, state.step, config.train.steps)
    sums = StepSums(topology)
    result: StepResult | None = None
    for batch in batches:
        output = run.engine(
            batch.input_ids_BS.to(topology.device),
            document_ids_BS=batch.document_ids_BS.to(topology.device),
            labels_BS=batch.labels_BS.to(topology.device),
            randomness=Randomness.of(config.train.seed, state.step, batch.sample_ids_B.to(topology.device)),
        )
        # The engine averages over micro-batches and ranks: this makes that average Σ nats / Σ targets.
        loss = output.lm_loss_sum * (micro_batches / max(1, targets))
        if config.model.mlp is Mlp.sparse:
            loss = loss + balance_loss(output.routers, config.router, num_layers=config.model.num_hidden_layers).total
        run.engine.backward(loss)
        result = run.engine.step(lr)
        sums.add(output.lm_loss_sum, loss, output.routers)
    assert result is not None
    if not result.applied:
        run.display.warn(f"step {state.step + 1}: a gradient is not finite; the update is skipped on every rank")
    state.step += 1
    state.consumed = run.loader.consumed
    tokens = config.train.global_batch_size * config.train.sequence_length
    state.tokens += tokens
    state.skipped_steps = run.engine.skipped_steps
    figures = sums.reduced(targets)
    seconds = time.perf_counter() - started
    return {
        "step": state.step,
        "tokens": state.tokens,
        **figures,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "skipped_steps": state.skipped_steps,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "mfu": tokens / seconds * run.flops_per_token / (run.peak_flops * topology.world_size),
    }


def _global_targets(batches: list[Batch], topology: Topology) -> int:
    mine = sum(int((batch.labels_BS != -100).sum()) for batch in batches)
    return int(topology.sum_(torch.tensor(mine, device=topology.device)))


def _evaluate(run: Run) -> dict[str, Any]:
    figures, routing = run.evaluation(_transformer(run))
    if run.topology.is_main and routing is not None:
        write_durably(run.folder / "routing.json", json.dumps({"step": run.state.step, **routing}) + "\n")
    return figures


def _sample(run: Run) -> None:
    """A continuation of `train.sample_prompt`. All ranks take part: with expert parallelism each holds a slice."""
    train = run.config.train
    text = sample_text(_transformer(run), run.corpus.tokenizer, train.sample_prompt, train.sample_tokens)
    if run.topology.is_main:
        with (run.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": run.state.step, "prompt": train.sample_prompt, "text": text}) + "\n")
        run.display.line(f"sample: {train.sample_prompt + text!r}")


def _save(run: Run) -> bool:
    """False, with a warning, when it could not be written: training goes on and older checkpoints are intact."""
    try:
        run.checkpoints.save(run.engine, run.state, to_yaml(run.config))
    except OSError as error:
        run.display.warn(str(error))
        return False
    return True


def _transformer(run: Run) -> Transformer:
    model = run.engine.model
    assert isinstance(model, Transformer)
    return model
