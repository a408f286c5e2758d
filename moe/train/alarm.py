"""The collapse alarm: says which layer and expert broke, by which metric and since when.

It reads the metrics, so it is the same on every rank, can be tried on any metrics.jsonl, and influences nothing. All
that a resume needs is in TrainState. docs/diagnostics.md says how the LIMITS were chosen and what they find.

Routers look collapsed at the start of training, and recover by themselves. So the alarm is armed once no layer has
been over a limit for SETTLED steps in a row, and in any case after `alarm.after` steps.

| metric | alarm | names |
| --- | --- | --- |
| load_concentration | its mean over WINDOW steps is over the limit | the fullest expert |
| router_entropy_of_mean | under the limit for LOW steps in a row | the fullest expert |
| expert_share | under the limit, in even shares 1/E, for STARVED steps in a row | that expert |
| router_bias_range | over the limit: scores are in [0, 1], so the bias alone chooses | the most biased expert |
| expert_output_norm | over the layer's median, it changed by the limit's factor between evaluations | that expert |
| router_update_norm | over the limit times its running mean, for FAST steps in a row | no expert |
| expert_weights | a step was skipped and they are not finite | that expert |
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moe.checkpoint.state import TrainState
from moe.config.train import AlarmConfig
from moe.errors import UserError

LIMITS = {
    "load_concentration": 0.9,
    "router_entropy_of_mean": 0.8,
    "expert_share": 0.01,
    "router_bias_range": 1.0,
    "expert_output_norm": 5.0,
    "router_update_norm": 4.0,
}
WINDOW, LOW, STARVED, FAST = 10, 5, 40, 3  # steps
USUAL = 0.1  # weight of the newest step in the running mean of update norms
SETTLED = 100  # steps
QUIET = 20  # steps without its cause after which an alarm ends; an output norm is one until an evaluation refutes it


@dataclass(frozen=True, slots=True)
class Cause:
    """A metric of a layer or expert that is over its limit now; `since` is the first such step in a row."""

    metric: str
    layer: int
    expert: int | None  # None: the layer's router as a whole
    value: float
    since: int

    @property
    def key(self) -> tuple[str, int, int]:
        """Causes with the same key in successive steps are one alarm. The fullest expert may change."""
        return self.metric, self.layer, self.expert if self.metric in OF_AN_EXPERT and self.expert is not None else -1


OF_AN_EXPERT = ("expert_share", "expert_output_norm", "expert_weights")


class Alarm:
    """Judges the metrics of each step, in order. `layers` are the numbers of the model's sparse layers."""

    def __init__(
        self, config: AlarmConfig, state: TrainState, layers: Sequence[int], warn: Callable[[str], None]
    ) -> None:
        self._config, self._state, self._layers, self._warn = config, state, layers, warn
        self._first = ""
        self.texts: list[str] = []  # of the alarms that began in the last step

    def judge(self, metrics: dict[str, Any], not_finite: Sequence[tuple[int, int]] = ()) -> dict[str, Any]:
        """What is added to the step's metrics: `alarms`, the number of active alarms, and, if new ones began,
        `new_alarms`, each with layer, expert, metric, value and since.

        `not_finite`: sparse layer (by its place among them) and expert of weights that are not finite.
        """
        shares = metrics["expert_shares"]
        if not shares or self._config.after is None:
            return {}
        step, memory = metrics["step"], self._memory(shares)
        causes = [*self._causes(metrics, memory, step)]
        memory["calm"] = 0 if causes else memory["calm"] + 1
        memory["armed"] = int(memory["armed"] or step >= self._config.after or memory["calm"] >= SETTLED)
        causes = causes if memory["armed"] else []
        causes += [Cause("expert_weights", layer, expert, math.nan, step) for layer, expert in not_finite]
        standing = {(metric, layer, expert): last for metric, layer, expert, last in memory["standing"]}
        new = [cause for cause in causes if cause.key not in standing]
        standing |= dict.fromkeys((cause.key for cause in causes), step)
        standing |= dict.fromkeys(self._unrefuted(standing, memory), step)
        memory["standing"] = [[*key, last] for key, last in standing.items() if step - last < QUIET]
        self.texts = [f"step {step}: {self._text(cause)}" for cause in new]
        if not new:
            return {"alarms": len(memory["standing"])}
        for text in self.texts:
            self._warn(f"alarm: {text}")
        self._first = self._first or self.texts[0]
        return {"alarms": len(memory["standing"]), "new_alarms": [self._entry(cause) for cause in new]}

    @property
    def stops(self) -> bool:
        """True once an alarm began in this process, if `alarm.stop`."""
        return self._config.stop and bool(self._first)

    def check(self) -> None:
        """At the end of the run. Raises UserError when it was stopped."""
        if self.stops:
            raise UserError(
                f"alarm: {self._first}; stopped by alarm.stop=true. The same command resumes from the newest "
                "checkpoint: change what broke (with checkpoint.allow_changes=true), or train on with alarm.stop=false"
            )

    def _memory(self, shares: list[list[float]]) -> dict[str, Any]:
        """What is known of earlier steps: nothing if the model or the alarm's own fields have changed since."""
        experts = [len(shares_E) for shares_E in shares]
        fresh = {
            "experts": experts,
            "calm": 0,
            "armed": 0,
            "loads": [[] for _ in experts],
            "crowded": [0 for _ in experts],
            "low": [0 for _ in experts],
            "fast": [0 for _ in experts],
            "moved": [0.0 for _ in experts],
            "starved": [[0] * count for count in experts],
            "norms": [[None] * count for count in experts],
            "normal_at": [[0] * count for count in experts],
            "standing": [],
        }
        known = self._state.alarm
        if known.keys() != fresh.keys() or known["experts"] != experts:
            self._state.alarm = fresh
        return self._state.alarm

    def _causes(self, metrics: dict[str, Any], memory: dict[str, Any], step: int) -> Iterator[Cause]:
        for layer, shares_E in enumerate(metrics["expert_shares"]):
            fullest = max(range(len(shares_E)), key=shares_E.__getitem__)
            yield from self._crowded(metrics, memory, step, layer, fullest)
            yield from self._unmixed(metrics, memory, step, layer, fullest)
            yield from self._starved(memory, step, layer, shares_E)
            yield from self._biased(metrics, step, layer)
            yield from self._hasty(metrics, memory, step, layer)
        if "expert_output_norm" in metrics:
            yield from self._changed(metrics["expert_output_norm"], memory, step)

    def _unrefuted(
        self, standing: dict[tuple[str, int, int], int], memory: dict[str, Any]
    ) -> list[tuple[str, int, int]]:
        """Alarms about output norms that no later evaluation has found good: they stay active between evaluations."""
        return [
            (metric, layer, expert)
            for (metric, layer, expert), last in standing.items()
            if metric == "expert_output_norm" and memory["normal_at"][layer][expert] < last
        ]

    def _crowded(
        self, metrics: dict[str, Any], memory: dict[str, Any], step: int, layer: int, fullest: int
    ) -> Iterator[Cause]:
        loads, limit = memory["loads"][layer], LIMITS["load_concentration"]
        loads.append(metrics["load_concentration_layers"][layer])
        del loads[:-WINDOW]
        mean = math.fsum(loads) / len(loads)
        if len(loads) < WINDOW or mean <= limit:
            memory["crowded"][layer] = 0
            return
        begun = next(place for place, load in enumerate(loads) if load > limit)
        memory["crowded"][layer] = memory["crowded"][layer] or step - WINDOW + 1 + begun
        yield Cause("load_concentration", layer, fullest, mean, memory["crowded"][layer])

    def _unmixed(
        self, metrics: dict[str, Any], memory: dict[str, Any], step: int, layer: int, fullest: int
    ) -> Iterator[Cause]:
        value = metrics["router_entropy_of_mean_layers"][layer]
        memory["low"][layer] = memory["low"][layer] + 1 if value < LIMITS["router_entropy_of_mean"] else 0
        if memory["low"][layer] >= LOW:
            yield Cause("router_entropy_of_mean", layer, fullest, value, step - memory["low"][layer] + 1)

    def _starved(self, memory: dict[str, Any], step: int, layer: int, shares_E: list[float]) -> Iterator[Cause]:
        starved = memory["starved"][layer]
        for expert, share in enumerate(shares_E):
            load = share * len(shares_E)
            starved[expert] = starved[expert] + 1 if load < LIMITS["expert_share"] else 0
            if starved[expert] >= STARVED:
                yield Cause("expert_share", layer, expert, load, step - starved[expert] + 1)

    def _biased(self, metrics: dict[str, Any], step: int, layer: int) -> Iterator[Cause]:
        bias_E = (metrics.get("router_bias") or {layer: []})[layer]
        if bias_E and max(bias_E) - min(bias_E) > LIMITS["router_bias_range"]:
            middle = statistics.median(bias_E)
            expert = max(range(len(bias_E)), key=lambda one: abs(bias_E[one] - middle))
            yield Cause("router_bias_range", layer, expert, max(bias_E) - min(bias_E), step)

    def _hasty(self, metrics: dict[str, Any], memory: dict[str, Any], step: int, layer: int) -> Iterator[Cause]:
        norm, usual = metrics["router_update_norm_layers"][layer], memory["moved"][layer]
        if not norm > 0:  # frozen, or a skipped step
            return
        fast = usual > 0 and norm > LIMITS["router_update_norm"] * usual
        memory["fast"][layer] = memory["fast"][layer] + 1 if fast else 0
        if not (fast and memory["armed"]):  # an unusual norm doesn't enter the running mean
            memory["moved"][layer] = (1 - USUAL) * usual + USUAL * norm if usual > 0 else norm
        if memory["fast"][layer] >= FAST:
            since = step - memory["fast"][layer] + 1
            yield Cause("router_update_norm", layer, None, norm / usual, since)

    def _changed(self, norms: list[list[float]], memory: dict[str, Any], step: int) -> Iterator[Cause]:
        limit = LIMITS["expert_output_norm"]
        for layer, norms_E in enumerate(norms):
            known = [norm for norm in norms_E if math.isfinite(norm)]
            median = statistics.median(known) if known else 0.0
            broken = False
            for expert, norm in enumerate(norms_E):
                if math.isnan(norm):  # it served no token
                    continue
                now, before = norm / median if median else math.inf, memory["norms"][layer][expert]
                change = now / before if before else now if now in (0, math.inf) else 1.0
                if memory["armed"] and not 1 / limit <= change <= limit:
                    broken = broken or not math.isfinite(now)
                    yield Cause("expert_output_norm", layer, expert, change, memory["normal_at"][layer][expert] + 1)
                elif math.isfinite(now):  # a broken expert is still compared with its last good norm
                    memory["norms"][layer][expert] = now
                    memory["normal_at"][layer][expert] = step
            if broken:  # its output has reached every later layer
                return

    def _entry(self, cause: Cause) -> dict[str, Any]:
        return {
            "layer": self._layers[cause.layer],
            "expert": cause.expert,
            "metric": cause.metric,
            "value": cause.value,
            "since": cause.since,
        }

    def _text(self, cause: Cause) -> str:
        what = {
            "load_concentration": "{0:.2f} of the largest possible overload",
            "router_entropy_of_mean": "{0:.2f} of an even router's entropy",
            "expert_share": "{0:.4f} of an even share",
            "router_bias_range": "{0:.2f}, more than scores can differ by",
            "expert_output_norm": "{0:.3g} × that of the last good evaluation, relative to its layer's median",
            "router_update_norm": "{0:.3g} × what was usual",
            "expert_weights": "not finite",
        }[cause.metric]
        where = f"layer {self._layers[cause.layer]}" + ("" if cause.expert is None else f", expert {cause.expert}")
        return f"{where}: {cause.metric} is {what.format(cause.value)}, since step {cause.since}"
