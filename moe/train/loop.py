"""`moe train`: from a checked configuration, or from the run directory's newest checkpoint, to a trained model.

    moe train                                                   # one process
    torchrun --nproc-per-node 2 -m moe train parallel.expert_parallel_size=2  # two, experts split over both

Around each training step (`moe.train.objective`) come evaluation, tracking, samples and checkpoints.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from moe.config import Config
from moe.config.compose import to_yaml
from moe.config.flat import flatten
from moe.config.idle import idle_keys
from moe.distributed import rendezvous
from moe.durable import append_line, write_durably
from moe.engine.base import SkipReason
from moe.errors import UserError
from moe.inference.generate import NotFiniteError, sample_text
from moe.locks import RunLock
from moe.model.transformer import Transformer
from moe.plan.fit import check_run
from moe.report.page import write_report
from moe.train.held_out import experts_not_finite
from moe.train.objective import training_step
from moe.train.optim import learning_rate
from moe.train.profile import in_part
from moe.train.progress import Display
from moe.train.setup import TrainingRun, set_up
from moe.train.tracking import finite


def train(config: Config) -> None:
    """Runs to `train.steps`. Raises UserError with one line for the user."""
    mesh = rendezvous.start(config.parallel.expert_parallel_size, flatten(config))
    try:
        display = Display(is_main=mesh.is_main, steps=config.train.steps, log_every=config.train.log_every)
        for line in idle_keys(config):
            display.warn_on_stderr(line)
        folder = Path(config.run_dir)
        mesh.agree(lambda: check_run(config, mesh.world_size, mesh.local_world_size, mesh.device), "memory")
        held = mesh.agree(lambda: RunLock(folder) if mesh.is_main else None, "run_dir")
        try:
            run = set_up(config, mesh, folder, display)
            if run.best.stops:
                display.line(f"{folder} is finished: it ended early at step {run.state.step}, {run.best.line()}")
                return
            if run.state.step >= run.config.train.steps:
                display.line(
                    f"{folder} is finished at step {run.state.step}; a larger train.steps goes on from there "
                    "(with checkpoint.allow_changes=true where the learning rate depends on it)"
                )
                return
            with run.stop, run.watchdog:
                _loop(run, held)
        finally:
            if held is not None:
                held.close()
    finally:
        rendezvous.stop()


def _loop(run: TrainingRun, held: RunLock | None) -> None:
    """`held` is rank 0's."""
    config, state, train = run.config, run.state, run.config.train
    run.display.start(state.step)
    began = time.monotonic() - state.elapsed  # as if the run had never been interrupted
    try:
        while state.step < train.steps and run.stop.agreed is None:
            with run.profiler.step() if run.profiler else nullcontext():
                metrics, not_finite = _step(run)
            if held is not None:
                held.check(state.step)
            state.elapsed = time.monotonic() - began
            metrics |= {"time": time.time(), "elapsed": state.elapsed}  # Unix seconds; seconds of training
            if run.profiler is not None:
                run.watchdog.beat(state.step, "the profile", long=True)
                _written(run, partial(run.profiler.end, metrics))
            last, best = state.step == train.steps, False
            if state.step % train.eval_every == 0 or last:
                metrics |= _evaluate(run)
                best = run.best.judge(metrics)
                last |= run.best.stops
            metrics |= run.alarm.judge(metrics, not_finite)
            if run.tracker is not None:
                run.tracker.log(metrics)
                run.tracker.alert(run.alarm.texts)
            run.display.step(metrics)
            if run.guard.exhausted or run.alarm.stops:
                break
            if (state.step % train.sample_every == 0 or last) and _transformer(run).is_causal:
                _sample(run)
            if state.step % config.checkpoint.every == 0 or best or last or run.stop.agreed is not None:
                run.watchdog.beat(state.step, "the save", long=True)
                run.saver.save(run.engine, run.state, to_yaml(run.config))
            if run.best.stops:
                run.display.line(f"step {state.step}: ends early, {run.best.line()}")
                break
        run.watchdog.beat(state.step, "the end of the last save", long=True)
        saved = run.saver.wait()
        stopped_itself = run.guard.exhausted or run.alarm.stops or run.best.stops
        finished = run.stop.agreed is None or state.step >= train.steps or stopped_itself
        if run.mesh.is_main and finished:
            _written(run, lambda: _report(run))
    finally:
        run.display.stop()
        run.collective_timing.remove()
        run.watchdog.beat(state.step, "the tracker's end", long=True)
        if run.tracker is not None:
            run.tracker.close()
    run.mesh.barrier()  # whatever started the ranks may end them all once one has left
    if not finished:
        assert run.stop.agreed is not None
        raise run.stop.stopped(run.folder, state.step, saved=saved) from run.saver.failure
    run.guard.check()
    run.alarm.check()
    if not saved:
        line = f"{run.folder}: training finished, but the last checkpoint could not be saved (see above)"
        raise UserError(line) from run.saver.failure


def _step(run: TrainingRun) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """One optimizer step over the next global batch: its metrics, and the experts whose weights are not finite."""
    run.collective_timing.begin()
    config, mesh, state = run.config, run.mesh, run.state
    number = state.step + 1
    run.watchdog.beat(number, "its start")
    asked = time.perf_counter()
    with in_part("data wait"):
        batches = run.loader.next_step()
    data_seconds = time.perf_counter() - asked
    lr = learning_rate(config, state.step)
    done = training_step(
        config,
        mesh,
        run.engine,
        batches,
        step=state.step,
        lr=lr,
        norm_limit=run.guard.norm_limit(),
        busy_seconds=run.collective_timing.busy_seconds,
        flags=run.stop.flags,
        before_micro_batch=lambda index: run.watchdog.beat(number, f"micro-batch {index + 1} of {len(batches)}"),
    )
    state.step = number
    run.guard.judge(done.result, range(state.consumed, run.loader.consumed), done.losses)
    state.consumed = run.loader.consumed
    tokens = config.train.global_batch_size * config.train.sequence_length
    state.tokens += tokens
    state.skipped_steps = run.engine.skipped_steps
    run.stop.agree(done.flags)
    not_finite = done.result.skipped is SkipReason.not_finite
    seconds = run.collective_timing.end()
    metrics = {
        "step": state.step,
        "tokens": state.tokens,
        **done.metrics,
        **run.straggler(state.step, seconds, done.busy_seconds),
        "grad_norm": done.result.grad_norm,
        "lr": lr,
        "skipped_steps": state.skipped_steps,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "data_wait": data_seconds / seconds,
        "mfu": tokens / seconds * run.flops_per_token / (run.peak_flops * mesh.world_size),
    }
    return metrics, experts_not_finite(run.engine.model, mesh) if not_finite else []


def _evaluate(run: TrainingRun) -> dict[str, Any]:
    state = run.state
    done = run.evaluation(
        _transformer(run),
        lambda part: run.watchdog.beat(state.step, part),
        state.step // run.config.train.eval_every,
        state.choices,
    )
    state.choices = done.choices
    if run.mesh.is_main and done.routing is not None:
        routing = {"step": state.step, **done.routing}
        text = json.dumps(routing) + "\n"
        _written(run, lambda: write_durably(run.folder / "routing.json", text))
        pairs = json.dumps(finite({"step": state.step, "layers": done.coactivation})) + "\n"
        _written(run, lambda: write_durably(run.folder / "coactivation.json", pairs))
        if run.tracker is not None:
            run.tracker.routing(routing)
    return done.metrics | _answers(run)


def _answers(run: TrainingRun) -> dict[str, float]:
    """What the answers to held-out rows are worth; the first of them go to answers.json and the terminal."""
    if run.answers is None:
        return {}
    step = run.state.step
    metrics, rows = run.answers(_transformer(run), lambda part: run.watchdog.beat(step, part, long=True))
    if run.mesh.is_main:
        text = json.dumps({"step": step, "rows": rows}) + "\n"
        _written(run, lambda: write_durably(run.folder / "answers.json", text))
        first = rows[0]
        run.display.line(f"answer: {first['prompt']!r} → {first['answer']!r}, expected {first['expected']!r}")
    return metrics


def _sample(run: TrainingRun) -> None:
    """A continuation of `train.sample_prompt`. All ranks take part: with expert parallelism each holds a slice."""
    stated, tokens = run.config.train.sample_prompt, run.config.train.sample_tokens
    prompt = run.corpus.opening() if stated is None else stated
    run.watchdog.beat(run.state.step, "the sample")
    try:
        text = sample_text(_transformer(run), run.corpus.tokenizer, prompt, tokens)
    except NotFiniteError as error:  # the same on all ranks; the guard decides whether training can go on
        run.display.warn(f"step {run.state.step}: no sample: {error}")
        return
    if run.mesh.is_main:
        sample = {"step": run.state.step, "prompt": prompt, "text": text}
        line = json.dumps(sample) + "\n"
        _written(run, lambda: append_line(run.folder / "samples.jsonl", line))
        run.display.line(f"sample: {prompt + text!r}")
        if run.tracker is not None:
            run.tracker.sample(sample)


def _report(run: TrainingRun) -> None:
    path = write_report(run.folder)
    run.display.line(f"report: {path}")
    if run.tracker is not None:
        run.tracker.report(path)


def _written(run: TrainingRun, write: Callable[[], None]) -> None:
    """Warns if `write` fails, as on a full disk: only failed checkpoints end a run (checkpoint.max_failures)."""
    try:
        write()
    except OSError as error:
        run.display.warn(f"step {run.state.step}: not written ({error})")


def _transformer(run: TrainingRun) -> Transformer:
    model = run.engine.model
    assert isinstance(model, Transformer)
    return model
