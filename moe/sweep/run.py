"""`moe sweep`: claims trials of a study, trains them in processes of their own, and records what came out.

    moe sweep sweep=router_quick run_dir=runs/quick sweep.trials=6

Ctrl-C and SIGTERM let the running trials save; after them and after `kill -9` the same command goes on.
"""

from __future__ import annotations

import json
import signal
import time
import uuid
from pathlib import Path
from types import FrameType

from optuna.trial import TrialState

from moe.config import Pruner, SweepConfig
from moe.durable import write_durably
from moe.errors import Stopped, UserError
from moe.locks import RunLock, locked
from moe.report.sweep_page import write_sweep_report
from moe.sweep.definition import Definition, Load, define, differences
from moe.sweep.progress import SweepDisplay
from moe.sweep.results import write_results
from moe.sweep.storage import BEAT_SECONDS, first_line, is_unreachable, masked, open_storage
from moe.sweep.study import CLAIMS, Study
from moe.sweep.worker import INTERRUPTED, OUTPUT, Worker

IDENTITY = "sweep.json"
FAILED_FIRST = 5  # trials that fail before any has succeeded: then the others would too
POLL_SECONDS = 0.2
SHOWN = 8  # differences between two sweeps that a message names


def run_sweep(config: SweepConfig, overrides: list[str], load: Load) -> None:
    """`overrides` are those of every trial; `load` composes a trial. Raises UserError, Stopped."""
    folder, settings = Path(config.run_dir), config.sweep
    definition = define(settings, overrides, load)
    if (folder / "config.yaml").exists():
        raise UserError(f"run_dir={folder} is the directory of a training run; choose another run_dir for the sweep")
    lock = RunLock(folder, shared=settings.join)
    try:
        name = _identity(folder, definition)
        storage = open_storage(settings.storage, folder)
        try:
            study = Study(folder, name, definition, storage, load)
            _Sweep(folder, definition, study).run()
        except Exception as error:
            if isinstance(error, UserError | Stopped) or not is_unreachable(error):
                raise
            stated = "the journal" if settings.storage is None else masked(settings.storage)
            raise UserError(
                f"sweep.storage={stated} no longer answers ({first_line(error)}); the same command goes on when it does"
            ) from error
    finally:
        lock.close()


def _identity(folder: Path, definition: Definition) -> str:
    """The study's name, made once for a folder. Raises UserError where the folder's study is another."""
    path, told = folder / IDENTITY, definition.as_dict()
    stated = definition.settings.storage
    storage = "a journal file" if stated is None else masked(stated)
    with locked(folder / CLAIMS):
        if not path.exists():
            name = f"{folder.resolve().name}-{uuid.uuid4().hex[:8]}"
            write_durably(path, json.dumps({"study": name, "storage": storage, "definition": told}, indent=1))
            return name
        found = json.loads(path.read_bytes())
    if changed := differences(found["definition"], told):
        more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise UserError(
            f"run_dir={folder} holds the study of another sweep: {'; '.join(changed[:SHOWN])}{more}; set it back, or "
            "choose another run_dir"
        )
    if found["storage"] != storage:
        raise UserError(
            f"run_dir={folder} holds a study that is kept in {found['storage']}, not in {storage}: set sweep.storage "
            "back, or choose another run_dir"
        )
    return found["study"]


class _Sweep:
    """The loop over places for trials; one process, whose trials are its children."""

    def __init__(self, folder: Path, definition: Definition, study: Study) -> None:
        self._folder, self._definition, self._study = folder, definition, study
        self._settings = definition.settings
        self._workers: list[Worker] = []
        self._display = SweepDisplay(folder, definition)
        self._signal: signal.Signals | None = None
        self._stopping = False
        self._beaten = 0.0

    def run(self) -> None:
        """Raises UserError, Stopped."""
        previous = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            self._record()
            self._loop()
        finally:
            for worker in self._workers:  # only after an error of the sweep itself
                worker.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)
        self._end()

    def _loop(self) -> None:
        deadline = None if self._settings.hours is None else time.monotonic() + 3600 * self._settings.hours
        while True:
            over = deadline is not None and time.monotonic() > deadline
            if (self._signal is not None or over) and not self._stopping:
                self._stopping = True
                self._display.line("stopping: the running trials save their state")
                for worker in self._workers:
                    worker.stop()
            if not self._stopping:
                self._fill()
            if not self._workers:
                return
            for worker in list(self._workers):
                self._look_at(worker)
            self._beat()
            self._display.tick(self._study, self._workers)
            time.sleep(POLL_SECONDS)

    def _fill(self) -> None:
        taken = {worker.slot for worker in self._workers}
        for slot in sorted(set(range(self._settings.workers)) - taken):
            before = len(self._study.finished())
            claimed = self._study.claim()
            if len(self._study.finished()) > before:  # trials whose configuration breaks a rule
                self._record()
            if claimed is None:
                return
            worker = Worker(claimed, slot, self._settings.workers, self._folder.resolve().name)
            self._workers.append(worker)
            self._display.started(worker)

    def _look_at(self, worker: Worker) -> None:
        code = worker.poll()
        if worker.metrics.read():
            dense = not worker.claimed.config.model.sparse_layer_numbers
            try:
                if not (dense and self._definition.has_routers):  # an arm without routers beside some with them
                    worker.metrics.check(self._settings.objectives)
            except UserError:
                self._give_up()
                raise
            if self._settings.pruner is not Pruner.none and not self._stopping and not worker.pruned:
                evaluated = worker.metrics.evaluations(self._settings.objectives[0])
                for step, value in evaluated.items():
                    if (
                        self._study.should_prune(worker.claimed, step, value)
                        and step < worker.claimed.config.train.steps
                    ):
                        worker.pruned = True
                        worker.stop()
                        break
        if code is not None:
            self._workers.remove(worker)
            self._ended(worker, code)

    def _ended(self, worker: Worker, code: int) -> None:
        claimed, metrics = worker.claimed, worker.metrics
        whole = code == 0  # also where it stopped early
        if not whole and not worker.pruned and (code in INTERRUPTED or (code and self._stopping)):
            self._study.release(claimed, f"ended with code {code}: {worker.last_line()}", stopped=self._stopping)
            self._display.interrupted(worker)
            return
        state = TrialState.COMPLETE if whole else TrialState.PRUNED if worker.pruned else TrialState.FAIL
        error = "" if state is not TrialState.FAIL else f"exit code {code}: {worker.last_line()}"
        elapsed = metrics.rows[metrics.last_step].get("elapsed", 0) if metrics.rows else 0
        self._study.finish(claimed, state, metrics, error, elapsed)
        self._record()
        self._display.finished(worker, self._study)
        finished = self._study.finished()
        failed = [trial for trial in finished if trial.user_attrs["state"] == TrialState.FAIL.name]
        if len(failed) == len(finished) >= FAILED_FIRST:
            self._give_up()
            self._nothing_came_out()

    def _give_up(self) -> None:
        """Lets the running trials save and end; the error that follows is the message."""
        self._stopping = True
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            while worker.poll() is None:
                time.sleep(POLL_SECONDS)
            self._study.release(worker.claimed, "the sweep ended", stopped=True)
        self._workers = []

    def _record(self) -> None:
        with locked(self._folder / CLAIMS):
            write_results(self._folder, self._definition, self._study)
            write_sweep_report(self._folder)

    def _beat(self) -> None:
        if time.monotonic() - self._beaten > BEAT_SECONDS:
            self._beaten = time.monotonic()
            for worker in self._workers:
                self._study.alive(worker.claimed)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._signal is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)

    def _end(self) -> None:
        if self._signal is not None:
            raise Stopped(
                f"{self._signal.name}: stopped; finished trials are in {self._folder / 'trials.csv'}, the same command "
                "goes on",
                self._signal,
            )
        finished = self._study.finished()
        if finished and all(trial.user_attrs["state"] == TrialState.FAIL.name for trial in finished):
            self._nothing_came_out()
        self._display.ended(self._study, self._stopping)

    def _nothing_came_out(self) -> None:
        finished = self._study.finished()
        first = finished[0]
        raise UserError(
            f"all {len(finished)} trials failed; trial {first.number}: {first.user_attrs['error']} (its output: "
            f"{self._folder / 'trials' / f'{first.number:04d}' / OUTPUT}); after a fix sweep again with another run_dir"
        )
