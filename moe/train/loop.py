"""`moe train`: from a checked configuration to a trained model, or from where the run directory stands.

    moe train                                                   # one process
    torchrun --nproc-per-node 2 -m moe train parallel.expert=2  # two, experts split over both

One step: loader → model → language-model and balance losses → engine → figures. The language-model loss is the sum over
the target tokens of the step's whole global batch divided by their number, so it doesn't depend on how many ranks or
micro-batches the batch is cut into; balance losses are means over micro-batches.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe.compose import to_yaml
from moe.config import Config, Mlp
from moe.data.loader import Batch
from moe.dist import topology as topology_module
from moe.dist.engine import StepResult
from moe.dist.topology import Topology
from moe.durable import append_line, write_durably
from moe.generate import sample_text
from moe.model.transformer import Transformer
from moe.report.page import write_report
from moe.sparse import Randomness
from moe.sparse.balance import balance_loss
from moe.train import rundir
from moe.train.metrics import StepSums
from moe.train.optim import learning_rate
from moe.train.progress import Display
from moe.train.setup import Run, set_up


def train(config: Config) -> None:
    """Runs to `train.steps`. Raises ValueError with one line for the user."""
    topology = topology_module.start(config.parallel.expert, rundir.flatten(config))
    try:
        display = Display(is_main=topology.is_main, steps=config.train.steps, log_every=config.train.log_every)
        folder = Path(config.run_dir)
        held = topology.agree(lambda: rundir.lock(folder) if topology.is_main else None, "run_dir")
        try:
            run = set_up(config, topology, folder, display)
            if run.state.step >= config.train.steps:
                display.line(f"{folder} is finished at step {run.state.step}; a larger train.steps goes on from there")
                return
            with run.stop, run.watchdog:
                _loop(run)
        finally:
            if held is not None:
                held.close()
    finally:
        topology_module.stop()


def _loop(run: Run) -> None:
    config, state, train = run.config, run.state, run.config.train
    run.display.start(state.step)
    try:
        while state.step < train.steps and run.stop.agreed is None:
            figures = _step(run)
            last = state.step == train.steps
            if state.step % train.eval_every == 0 or last:
                figures |= _evaluate(run)
            if run.tracker is not None:
                run.tracker.log(figures)
            run.display.step(figures)
            if run.guard.exhausted:
                break
            if state.step % train.sample_every == 0 or last:
                _sample(run)
            if state.step % config.checkpoint.every == 0 or last or run.stop.agreed is not None:
                run.watchdog.beat(state.step, "the save", long=True)
                run.saver.save(run.engine, run.state, to_yaml(run.config))
        run.watchdog.beat(state.step, "the end of the last save", long=True)
        saved = run.saver.wait()
    finally:
        run.display.stop()
        run.waits.remove()
        run.watchdog.beat(state.step, "the tracker's end", long=True)
        if run.tracker is not None:
            run.tracker.close()
    if run.stop.agreed is not None and state.step < train.steps and not run.guard.exhausted:
        run.topology.barrier()  # whatever started the ranks may end them all once one has left
        raise run.stop.stopped(run.folder, state.step, saved=saved)
    if run.topology.is_main:
        _written(run, lambda: run.display.line(f"report: {write_report(run.folder)}"))
    run.topology.barrier()  # as above
    run.guard.check()
    if not saved:
        raise ValueError(f"{run.folder}: training finished, but the last checkpoint could not be saved (see above)")


def _step(run: Run) -> dict[str, Any]:
    """One optimizer step over the next global batch; its figures."""
    run.waits.begin()
    run.watchdog.beat(run.state.step + 1, "its start")
    config, topology, state = run.config, run.topology, run.state
    batches = run.loader.next_step()
    targets = _global_targets(batches, topology)
    micro_batches = len(batches) * topology.world_size
    lr = learning_rate(config.optim, state.step, config.train.steps)
    norm_limit = run.guard.norm_limit()
    sums = StepSums(topology)
    result: StepResult | None = None
    for number, batch in enumerate(batches, 1):
        run.watchdog.beat(state.step + 1, f"micro-batch {number} of {len(batches)}")
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
        result = run.engine.step(lr, norm_limit)
        run.guard.saw(loss, batch.sample_ids_B)
        sums.add(output.lm_loss_sum, loss, output.routers)
    assert result is not None
    state.step += 1
    run.guard.judge(result, range(state.consumed, run.loader.consumed))
    state.consumed = run.loader.consumed
    tokens = config.train.global_batch_size * config.train.sequence_length
    state.tokens += tokens
    state.skipped_steps = run.engine.skipped_steps
    figures, busy, flags = sums.reduced(targets, run.waits.busy_seconds, run.stop.flags())
    run.stop.agree(flags)
    seconds = run.waits.end()
    figures |= run.straggler(state.step, seconds, busy)
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
    figures, routing = run.evaluation(_transformer(run), lambda part: run.watchdog.beat(run.state.step, part))
    if run.topology.is_main and routing is not None:
        text = json.dumps({"step": run.state.step, **routing}) + "\n"
        _written(run, lambda: write_durably(run.folder / "routing.json", text))
    return figures


def _sample(run: Run) -> None:
    """A continuation of `train.sample_prompt`. All ranks take part: with expert parallelism each holds a slice."""
    train = run.config.train
    run.watchdog.beat(run.state.step, "the sample")
    text = sample_text(_transformer(run), run.corpus.tokenizer, train.sample_prompt, train.sample_tokens)
    if run.topology.is_main:
        line = json.dumps({"step": run.state.step, "prompt": train.sample_prompt, "text": text}) + "\n"
        _written(run, lambda: append_line(run.folder / "samples.jsonl", line))
        run.display.line(f"sample: {train.sample_prompt + text!r}")


def _written(run: Run, write: Callable[[], None]) -> None:
    """A full disk costs what can be made again, not the run: checkpoints alone decide (checkpoint.max_failures)."""
    try:
        write()
    except OSError as error:
        run.display.warn(f"step {run.state.step}: not written ({error})")


def _transformer(run: Run) -> Transformer:
    model = run.engine.model
    assert isinstance(model, Transformer)
    return model
