"""A study of Optuna's: which point is next, who may train it, what came out.

All that a restart needs is in the storage and in the trials' run directories. A trial that is still RUNNING there, and
whose lease is free, was lost: it is given out again and goes on from its checkpoint.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from moe.config import Config, Pruner, Sampler
from moe.config.space import Dimension, Value
from moe.errors import UserError
from moe.locks import locked
from moe.sweep.definition import POINT, Definition, Load, config_digest
from moe.sweep.lease import Lease, take_lease
from moe.sweep.metrics import TOLD, Metrics, newest_checkpoint
from moe.sweep.storage import beat, without_heartbeat

MAX_LOST = 3  # times that a trial may be lost in a row without a new checkpoint
MAX_DUPLICATES = 200  # in a row: then the sampler finds nothing new
MIN_FOR_IMPORTANCE = 4  # trials
TRIALS = "trials"
CLAIMS = ".claims"

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", message="PedAnovaImportanceEvaluator computes")  # what is wanted, see `importance`
warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used with Study.optimize")


@dataclass(slots=True)
class Claimed:
    """A trial that this process trains, in `run_dir`."""

    trial: optuna.trial.Trial
    number: int
    params: dict[str, Any]
    seed: int
    overrides: list[str]
    config: Config
    run_dir: Path
    lease: Lease


class Study:
    """Processes that share a folder may each have one; what must not happen twice happens under a lock in it."""

    def __init__(self, folder: Path, name: str, definition: Definition, storage: BaseStorage, load: Load) -> None:
        self._folder, self._definition, self._storage, self._load = folder, definition, storage, load
        settings = definition.settings
        self.exhausted = False
        self._configs: dict[tuple[str, ...], tuple[Config, str]] = {}
        directions = [
            StudyDirection.MAXIMIZE if name in settings.maximize else StudyDirection.MINIMIZE
            for name in settings.objectives
        ]
        with locked(folder / CLAIMS):
            self._study = optuna.create_study(
                study_name=name,
                storage=storage,
                directions=directions,
                load_if_exists=True,
                pruner=_pruner(definition),
            )
            self._enqueue_listed()

    # what there is

    def trials(self) -> list[FrozenTrial]:
        """Without those that were another trial again."""
        trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if "duplicate_of" not in trial.user_attrs]

    def finished(self) -> list[FrozenTrial]:
        return [trial for trial in self.trials() if trial.state.is_finished() and "state" in trial.user_attrs]

    def importance(self) -> dict[str, dict[str, float]]:
        """Optuna's importance of each searched key for each objective; empty while there are too few trials for it."""
        objectives = self._definition.settings.objectives
        complete = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(complete) < MIN_FOR_IMPORTANCE or len(self._dimensions()) < 2:
            return {}
        told = {}
        for index, name in enumerate(objectives):
            if len({trial.values[index] for trial in complete}) > 1:
                # PED-ANOVA, Optuna's default, takes a lower target for a better one
                sign = -1 if name in self._definition.settings.maximize else 1
                told[name] = optuna.importance.get_param_importances(
                    self._study, target=lambda trial, index=index, sign=sign: sign * trial.values[index]
                )
        return told

    def budget_left(self) -> bool:
        settings, trials = self._definition.settings, self.trials()
        running = sum(trial.state is TrialState.RUNNING for trial in trials)
        finished = self.finished()
        if settings.trials is not None and len(finished) + running >= settings.trials:
            return False
        spent = sum(trial.user_attrs["tokens"] for trial in finished) + running * self._definition.tokens()
        return settings.tokens is None or spent < settings.tokens

    # claims

    def claim(self) -> Claimed | None:
        """A lost trial, or the next one; None when there is nothing to train (now, or any more). Finishes trials that
        can't be trained on the way."""
        with locked(self._folder / CLAIMS):
            return self._adopt() or self._new()

    def _adopt(self) -> Claimed | None:
        silent = without_heartbeat(self._storage, self._study._study_id)
        for frozen in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            lease = take_lease(
                self._run_dir(frozen.number), lost=None if silent is None else frozen._trial_id in silent
            )
            if lease is None:
                continue
            if self._storage.get_trial(frozen._trial_id).state is not TrialState.RUNNING:  # it ended a moment ago
                lease.close()
                continue
            claimed = self._claimed(optuna.trial.Trial(self._study, frozen._trial_id), lease)
            if claimed is not None and self._may_go_on(claimed):
                return claimed
        return None

    def _may_go_on(self, claimed: Claimed) -> bool:
        """Counts how often it was lost in a row without a new checkpoint; at MAX_LOST it fails."""
        trial, step = claimed.trial, newest_checkpoint(claimed.run_dir)
        attrs = trial.user_attrs
        stopped = attrs.get("stopped", False)
        lost = attrs.get("lost", 0) + (not stopped) if step == attrs.get("lost_at", 0) else 0
        trial.set_user_attr("lost", lost)
        trial.set_user_attr("lost_at", step)
        trial.set_user_attr("stopped", False)
        if lost < MAX_LOST:
            return True
        why = attrs.get("why", "its process or its machine ended")
        self.finish(claimed, TrialState.FAIL, None, f"lost {lost} times at checkpoint {step}: {why}")
        return False

    def _new(self) -> Claimed | None:
        for _ in range(MAX_DUPLICATES):
            if not self.budget_left():
                return None
            known = self._study.get_trials(deepcopy=False)
            waiting = any(trial.state is TrialState.WAITING for trial in known)
            if not waiting and self._definition.listed() is not None:
                return None
            # A function of the trial's number, so that a sweep that was interrupted goes on as one that was not.
            self._study.sampler = _sampler(self._definition, len(known))
            trial = self._study.ask()
            lease = take_lease(self._run_dir(trial.number), lost=True)
            assert lease is not None, "a trial that has just been made was taken"
            claimed = self._claimed(trial, lease)
            if claimed is not None:
                return claimed
        self.exhausted = True
        return None

    def _claimed(self, trial: optuna.trial.Trial, lease: Lease) -> Claimed | None:
        """None, and the trial is finished, where its configuration breaks a rule or was trained already."""
        beat(self._storage, trial._trial_id)
        point = {one.key: _suggest(trial, one) for one in self._dimensions()}
        seed = trial.user_attrs.get("seed", self._definition.base.train.seed)
        overrides = self._definition.overrides(point, seed)
        run_dir = self._run_dir(trial.number)
        try:
            config, digest = self._composed(overrides)
        except UserError as error:
            self._tell(trial, TrialState.FAIL, None, {"error": str(error), "seed": seed, "tokens": 0})
            lease.close()
            return None
        same = [other for other in self.trials() if other.user_attrs.get("config") == digest]
        same = [other for other in same if other.number != trial.number]
        if same:
            trial.set_user_attr("duplicate_of", same[0].number)
            self._tell_again(trial, same[0])
            lease.close()
            return None
        trial.set_user_attr("seed", seed)
        trial.set_user_attr("config", digest)
        self._enqueue_seeds(trial, point)
        return Claimed(trial, trial.number, self._definition.params(point), seed, overrides, config, run_dir, lease)

    def _composed(self, overrides: list[str]) -> tuple[Config, str]:
        key = tuple(overrides)
        if key not in self._configs:
            config = self._load(overrides)
            self._configs[key] = config, config_digest(config)
        return self._configs[key]

    def _run_dir(self, number: int) -> Path:
        return self._folder / TRIALS / f"{number:04d}"

    def _dimensions(self) -> list[Dimension]:
        if self._definition.settings.sampler is not Sampler.points:
            return self._definition.dimensions
        names = tuple(self._definition.settings.points)
        return [Dimension(POINT, "", values=names, texts=names)]

    # a list of trials to come

    def _enqueue_listed(self) -> None:
        """All points of a grid or list, each seed in turn; those that an interrupted command left out too."""
        points = self._definition.listed()
        if points is None:
            return
        there = {trial.user_attrs.get("job") for trial in self._study.get_trials(deepcopy=False)}
        first = self._definition.base.train.seed
        for seed in range(self._definition.settings.seeds):
            for index, point in enumerate(points):
                job = seed * len(points) + index
                if job not in there:
                    self._study.enqueue_trial(point, user_attrs={"job": job, "seed": first + seed})

    def _enqueue_seeds(self, trial: optuna.trial.Trial, point: Mapping[str, Value]) -> None:
        """The other seeds of a new point."""
        seeds = self._definition.settings.seeds
        if seeds == 1 or "job" in trial.user_attrs or "seed_of" in trial.user_attrs:
            return
        there = {
            other.user_attrs.get("seed")
            for other in self._study.get_trials(deepcopy=False)
            if other.user_attrs.get("seed_of") == trial.number
        }
        first = self._definition.base.train.seed
        for seed in range(first + 1, first + seeds):
            if seed not in there:
                self._study.enqueue_trial(dict(point), user_attrs={"seed_of": trial.number, "seed": seed})

    # while one is trained, and its end

    def alive(self, claimed: Claimed) -> None:
        """Every few seconds, for the other machines."""
        claimed.lease.renew()
        beat(self._storage, claimed.trial._trial_id)

    def should_prune(self, claimed: Claimed, step: int, value: float) -> bool:
        if step not in self._study._storage.get_trial(claimed.trial._trial_id).intermediate_values:
            claimed.trial.report(value, step)
        return claimed.trial.should_prune()

    def release(self, claimed: Claimed, why: str, *, stopped: bool) -> None:
        """It is not finished: whoever claims it next goes on from its checkpoint. `stopped`: as it was asked to."""
        claimed.trial.set_user_attr("stopped", stopped)
        claimed.trial.set_user_attr("why", why)
        claimed.lease.close()

    def finish(
        self, claimed: Claimed, state: TrialState, metrics: Metrics | None, error: str = "", seconds: float = 0
    ) -> None:
        """Records what came out; a trial that reached no finite objective has failed."""
        settings = self._definition.settings
        attrs: dict[str, Any] = {"seed": claimed.seed, "error": error, "seconds": seconds, "tokens": 0, "steps": 0}
        values: dict[str, float | None] = {}
        if metrics is not None and metrics.rows:
            last = metrics.rows[metrics.last_step]
            names = dict.fromkeys((*settings.objectives, *TOLD))
            values = {name: metrics.value(name, settings.average_steps) for name in names}
            attrs |= {"tokens": last["tokens"], "steps": last["step"]}
            broken = [name for name in settings.objectives if not math.isfinite(values[name] or 0)]
            if broken and state is TrialState.COMPLETE:
                state, attrs["error"] = TrialState.FAIL, f"{broken[0]} is not a finite number"
        attrs["metrics"] = {name: value for name, value in values.items() if value is None or math.isfinite(value)}
        self._tell(claimed.trial, state, [values.get(name) for name in settings.objectives], attrs)
        claimed.lease.close()

    def _tell(
        self, trial: optuna.trial.Trial, state: TrialState, values: list[float | None] | None, attrs: dict[str, Any]
    ) -> None:
        for key, value in attrs.items():
            trial.set_user_attr(key, value)
        trial.set_user_attr("state", state.name)
        self._tell_optuna(trial, state, values)

    def _tell_optuna(self, trial: optuna.trial.Trial, state: TrialState, values: list[float | None] | None) -> None:
        """Optuna's own state is FAIL also where an objective is missing, as MaxVio is in a dense model: its samplers
        then leave the trial out."""
        whole = [value for value in values or () if value is not None]
        if state is TrialState.COMPLETE and values is not None and len(whole) == len(values):
            self._study.tell(trial.number, whole, state)
        else:
            self._study.tell(trial.number, state=TrialState.FAIL if state is TrialState.COMPLETE else state)

    def _tell_again(self, trial: optuna.trial.Trial, same: FrozenTrial) -> None:
        complete = same.state is TrialState.COMPLETE
        self._study.tell(
            trial.number,
            list(same.values) if complete else None,
            TrialState.COMPLETE if complete else TrialState.FAIL,
        )


def _suggest(trial: optuna.trial.Trial, one: Dimension) -> Any:
    """The value that a trial has, or that the sampler gives it now."""
    if one.values:
        return trial.suggest_categorical(one.key, one.values)
    if one.whole:
        step = 1 if one.step is None else int(one.step)
        return trial.suggest_int(one.key, int(one.low), int(one.high), step=step, log=one.log)
    return trial.suggest_float(one.key, one.low, one.high, step=one.step, log=one.log)


def _sampler(definition: Definition, number: int) -> BaseSampler:
    settings = definition.settings
    digest = hashlib.sha256(f"{settings.sampler_seed} {number}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    if settings.sampler is Sampler.tpe:
        return TPESampler(seed=seed, constant_liar=settings.workers > 1 or settings.join)
    if settings.sampler is Sampler.nsga2:
        generation = 50 if settings.trials is None else min(50, max(4, settings.trials // 5))
        return NSGAIISampler(seed=seed, population_size=generation)
    return RandomSampler(seed=seed)


def _pruner(definition: Definition) -> optuna.pruners.BasePruner:
    train = definition.base.train
    if definition.settings.pruner is Pruner.median:
        return optuna.pruners.MedianPruner(n_startup_trials=4)
    if definition.settings.pruner is Pruner.hyperband:
        return optuna.pruners.HyperbandPruner(min_resource=train.eval_every, max_resource=train.steps)
    return optuna.pruners.NopPruner()
