"""Search spaces in Hydra's override language: choice(…), range(…), interval(…), tag(log, …), int(…) or `a,b`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from moe.config.presets import choices, groups
from moe.config.rules import require
from moe.errors import UserError

Value = bool | int | float | str | None


@dataclass(frozen=True, slots=True)
class Dimension:
    """One searched key. `values` are those of a categorical one, with their texts in an override; else a range of
    numbers from `low` to `high`, both included, every `step` or on a log scale."""

    key: str
    expression: str
    values: tuple[Value, ...] = ()
    texts: tuple[str, ...] = ()
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    whole: bool = False

    def override(self, value: Value) -> str:
        """`key=value` as it is typed after `moe train`."""
        text = self.texts[self.values.index(value)] if self.values else repr(value)
        return f"{self.key}={text}"

    def finite(self) -> tuple[Value, ...]:
        """All values, for a grid. Raises UserError for an interval."""
        if self.values:
            return self.values
        require(
            self.step is not None,
            f"sweep.space.{self.key}={self.expression}: sweep.sampler=grid needs choice(…) or range(…), not "
            "an interval",
        )
        assert self.step is not None
        count = int((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(self.low + index * self.step for index in range(count))

    def examples(self) -> tuple[Value, ...]:
        """Values with which the configuration is tried before anything is trained."""
        return self.values or (self.low, self.high)


def flat_space(space: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: expression}, also of nested keys, as `sweep.space.router.top_k=1,2` on a command line makes them."""
    flat: dict[str, Any] = {}
    for key, value in space.items():
        flat |= flat_space(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def read_space(space: Mapping[str, Any]) -> list[Dimension]:
    """Raises UserError naming the key, what it is set to, and the rule."""
    return [_dimension(key, value) for key, value in flat_space(space).items()]


def _dimension(key: str, expression: Any) -> Dimension:
    stated = f"sweep.space.{key}={expression}"
    require(
        not isinstance(expression, list), f"{stated}: must be in Hydra's override language, as in choice(0.001, 0.01)"
    )
    override = parse(f"{key}={expression}", stated)
    require(
        override.is_sweep_override(),
        f"{stated} is one value: a space needs choice(…), range(…) or interval(…); what is the same in every trial "
        f"belongs to sweep.overrides: [{key}={expression}]",
    )
    found = override.value()
    tags = getattr(found, "tags", set())
    require(tags <= {"log"}, f"{stated}: tag({', '.join(sorted(tags - {'log'}))}, …): the only tag is log")
    require(not getattr(found, "shuffle", False), f"{stated}: shuffle(…): the sampler decides the order")
    if isinstance(found, IntervalSweep):
        assert found.start is not None
        assert found.end is not None
        low, high = found.start, found.end
        require(low < high, f"{stated}: interval({low:g}, {high:g}): the first number must be < the second")
        require("log" not in tags or low > 0, f"{stated}: a log interval must begin above 0, not at {low:g}")
        whole = isinstance(low, int)
        return Dimension(
            key, str(expression), low=low, high=high, log="log" in tags, whole=whole,
            step=1 if whole and "log" not in tags else None,
        )  # fmt: skip
    require("log" not in tags, f"{stated}: tag(log, …) needs interval(…), or int(interval(…)) for whole numbers")
    texts = sweep_texts(override)
    values = _categories(override, texts)
    require(len(texts) > 0, f"{stated} is empty: it must have a value")
    require(len(set(texts)) == len(texts), f"{stated}: must have each value once")
    if isinstance(found, RangeSweep) and len(values) > 1:
        numbers = [float(value) for value in values if isinstance(value, (int, float))]
        whole = all(isinstance(value, int) for value in values)
        low, high = min(numbers), max(numbers)
        step = (high - low) / (len(numbers) - 1)
        if whole:
            low, high, step = int(low), int(high), round(step)
        return Dimension(key, str(expression), low=low, high=high, step=step, whole=whole)
    return Dimension(key, str(expression), values=values, texts=tuple(texts))


def parse(override: str, stated: str | None = None) -> Override:
    """Raises UserError: `stated` (or the override), and what Hydra says."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{stated or override}: not in Hydra's override language ({reason})") from error


def sweep_texts(override: Override) -> list[str]:
    """The values of a sweep as an override spells them; of a group `glob(…)` gives the matching presets. Raises
    UserError for what has no list of values."""
    key, found = override.key_or_group, override.value()
    if isinstance(found, Glob):
        require(key in groups(), f"{override.input_line}: glob(…) is for a group ({', '.join(groups())})")
        return found.filter(choices(key))
    require(
        not isinstance(found, IntervalSweep), f"{override.input_line}: interval(…) has no list of values: `moe sweep`"
    )
    return list(override.sweep_string_iterator())


def _categories(override: Override, texts: list[str]) -> tuple[Value, ...]:
    """Plain values where they are, else their texts."""
    found = override.value()
    if isinstance(found, ChoiceSweep):
        plain = [value for value in found.list if value is None or isinstance(value, bool | int | float | str)]
        return tuple(plain) if len(plain) == len(found.list) else tuple(texts)
    if not isinstance(found, RangeSweep):
        return tuple(texts)
    return tuple(int(text) if re.fullmatch(r"-?\d+", text) else float(text) for text in texts)
