"""What all routers share, and the dataclass and module that belong to `router.kind`.

A new router is a file in moe/sparse/routers/, a dataclass (`moe.config.router_kinds` has those that come with the
package), one `register_router` and a YAML in configs/router/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from moe.config.rules import not_negative, positive, require
from moe.config.schedules import by_number, points_of, value_at
from moe.errors import UserError

# The same in every layer: what is split over ranks, trained or frozen, and decided for the whole model.
FOR_ALL_LAYERS = ("kind", "num_experts", "freeze_first_steps", "freeze_last_steps", "schedules", "layers")


@dataclass(kw_only=True, slots=True)
class RouterConfig:
    """What every router has. `kind` decides which options there are beside these, and which module is built.

    In the first `freeze_first_steps` and the last `freeze_last_steps` optimizer steps its weights and its bias stay as
    they are. `schedules` gives an option's value at some steps, {option: {step: value}}: linear between them, constant
    before the first and after the last; a whole number holds until the next step named. `layers` gives other options to
    some layers, {layer: {option: value}}, layers counted from 0.
    """

    kind: str = "topk"
    num_experts: int = 8
    freeze_first_steps: int = 0
    freeze_last_steps: int = 0
    schedules: dict[str, Any] = field(default_factory=dict)
    layers: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive("router", self, "num_experts")
        not_negative("router", self, "freeze_first_steps", "freeze_last_steps")
        require(
            registered_router(self.kind).schema is type(self),
            f"router.kind={self.kind} must be chosen by a preset (router=topk): it decides which options there are",
        )
        for name in self.schedules:
            require(
                name in self.scheduled(),
                f"router.schedules.{name}: {self.kind} routers can schedule {', '.join(self.scheduled()) or 'nothing'}",
            )
        self.schedules = {
            name: points_of(f"router.schedules.{name}", points, whole=isinstance(getattr(self, name), int))
            for name, points in self.schedules.items()
        }
        for name, points in self.schedules.items():
            for step in points:
                self._with({name: self.at(name, step)}, f"router.schedules.{name}")
        self.layers = by_number("router.layers", self.layers)
        for layer, options in self.layers.items():
            self._check_layer(f"router.layers.{layer}", options)

    @classmethod
    def scheduled(cls) -> tuple[str, ...]:
        """Names of the options that `schedules` may hold."""
        return ()

    def at(self, name: str, step: int) -> Any:
        """The option's value in optimizer step `step` (0-based)."""
        value = getattr(self, name)
        return value_at(self.schedules[name], step, whole=isinstance(value, int)) if name in self.schedules else value

    def highest(self, name: str) -> Any:
        """The option's largest value in any step."""
        points = self.schedules.get(name)
        return max(self.at(name, step) for step in points) if points else getattr(self, name)

    def for_layer(self, layer: int) -> Any:
        """The configuration of this layer's router."""
        return self._with(self.layers.get(layer, {}), f"router.layers.{layer}", schedules=self.schedules)

    @property
    def freezes(self) -> bool:
        return self.freeze_first_steps > 0 or self.freeze_last_steps > 0

    def frozen(self, step: int, total_steps: int) -> bool:
        """Whether the router stays as it is in optimizer step `step` (0-based) of `total_steps`."""
        return step < self.freeze_first_steps or step >= total_steps - self.freeze_last_steps

    @property
    def experts_per_token(self) -> int:
        """Experts that compute a token, at most or on average; what plans of FLOPs, rows and memory count with."""
        raise NotImplementedError(f"router.kind={self.kind} must say how many experts compute a token")

    def choices_in(self, layers: Sequence[int]) -> int:
        """Experts that compute a token in these layers together."""
        own = (layer for layer in self.layers if layer in layers)
        each = self.experts_per_token
        return len(layers) * each + sum(self.for_layer(layer).experts_per_token - each for layer in own)

    def most_choices_in(self, layers: Sequence[int]) -> int:
        """Experts that compute a token in the one of these layers that has the most; 0 without layers."""
        if not layers:
            return 0
        own = [layer for layer in self.layers if layer in layers]
        each = [self.for_layer(layer).experts_per_token for layer in own]
        return max([*each, self.experts_per_token] if len(own) < len(layers) else each)

    @property
    def is_causal(self) -> bool:
        """Whether a token's experts depend on no later token: only then can text be generated."""
        return True

    def parameter_names(self) -> tuple[str, ...]:
        """Those of one layer's router, each [num_experts, hidden_size]."""
        return ("weight",)

    def num_parameters(self, hidden_size: int) -> int:
        """Weights of one layer's router."""
        return len(self.parameter_names()) * self.num_experts * hidden_size

    def _check_layer(self, key: str, options: object) -> None:
        require(isinstance(options, Mapping), f"{key}={options} must be a mapping of options, as in {key}={{top_k:1}}")
        assert isinstance(options, Mapping)
        names = [one.name for one in fields(self) if one.name not in FOR_ALL_LAYERS]
        for name in options:
            require(
                name in names,
                f"{key}.{name}: a layer of its own can have {', '.join(names)}; all layers share the other options",
            )
        self._with(options, key, schedules=self.schedules)

    def _with(self, options: Mapping[str, Any], key: str, schedules: Mapping[str, Any] | None = None) -> Any:
        """These options in place of this configuration's, and of its schedules those of other options.

        Raises UserError, naming `key`, when an option is of the wrong type or breaks a rule.
        """
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        node: Any = OmegaConf.structured(type(self))
        mine = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("schedules", "layers")}
        others = {name: points for name, points in (schedules or {}).items() if name not in options}
        try:
            return OmegaConf.to_object(OmegaConf.merge(node, mine, {"schedules": others}, options))
        except (UserError, OmegaConfBaseException) as error:
            cause = error.__cause__ if isinstance(error.__cause__, UserError) else error
            raise UserError(f"{key}: {str(cause).splitlines()[0]}") from None


@dataclass(frozen=True, slots=True)
class RegisteredRouter:
    """`module` is `package.module:Class`, imported when a layer is built: configurations are read without torch."""

    schema: type[RouterConfig]
    module: str


_ROUTERS: dict[str, RegisteredRouter] = {}


def register_router(kind: str, schema: type[RouterConfig], module: str) -> None:
    """From now on `router.kind=KIND` means this dataclass and the `moe.sparse.routers.base.Router` at `module`."""
    _ROUTERS[kind] = RegisteredRouter(schema, module)


def registered_router(kind: object) -> RegisteredRouter:
    """Raises UserError for a kind that isn't registered."""
    require(
        isinstance(kind, str) and kind in _ROUTERS, f"router.kind={kind} must be one of {', '.join(sorted(_ROUTERS))}"
    )
    return _ROUTERS[str(kind)]


def kinds_with(option: str) -> list[str]:
    """The kinds of router that have this option."""
    return [kind for kind in router_kinds() if option in {one.name for one in fields(_ROUTERS[kind].schema)}]


def saved_kind(section: object) -> object:
    """`kind` of a config.yaml's section `router`; before there were kinds, every router was top-k."""
    return section.get("kind", "topk") if isinstance(section, Mapping) else "topk"


def saved_router(section: Mapping[str, Any]) -> RouterConfig:
    """A config.yaml's section `router`, checked. Raises UserError, OmegaConfBaseException."""
    from omegaconf import OmegaConf

    defaults = OmegaConf.structured(registered_router(saved_kind(section)).schema)
    config: Any = OmegaConf.to_object(OmegaConf.merge(defaults, section))
    return config


def router_kinds() -> list[str]:
    return sorted(_ROUTERS)
