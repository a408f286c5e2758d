"""From `key=value` overrides to a checked `Config`: Hydra composes, the dataclasses check."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from moe.config import CheckpointConfig, Config, ModelConfig, TokenizerConfig
from moe.config.choices import AnswerMetric
from moe.config.data import path_name
from moe.config.explain import explain
from moe.config.keys import check_form
from moe.config.migrate import migrate
from moe.config.overrides import for_hydra
from moe.config.presets import composed_folder
from moe.config.router import registered_router, router_kinds, saved_kind
from moe.config.saved import INTERPOLATION, read_saved
from moe.config.source import ReadSource, source_presets, stated, stated_keys
from moe.config.suggest import dotted_keys, no_such_key, of_other_routers
from moe.errors import ConfigError, UserError


def _data_name(preset: str, *, _root_: Any) -> str:
    """The data's name inside `run_dir`: from `data.path` if it is set, else the `data` preset's name."""
    path = OmegaConf.select(_root_, "data.path", throw_on_missing=False)
    return path_name(str(path or "")) or preset


OmegaConf.register_new_resolver("data_name", _data_name, replace=True)


def compose_dict(
    overrides: list[str],
    name: str = "train",
    schema: type = Config,
    count_pieces: CountPieces | None = None,
    read_source: ReadSource | None = None,
) -> DictConfig:
    """Composes the typed configuration without running the dataclasses' rules.

    `count_pieces` returns the vocabulary size of an existing tokenizer; it is called when `model.vocab_size` follows
    from the tokenizer. `read_source` returns what `init_from` has. Raises ConfigError, and whatever these two raise.
    """
    if read_source is not None and (init_from := stated(overrides, "init_from")):
        sections = read_source(init_from, os.path.expanduser(stated(overrides, "run_dir") or "") or None)
        with source_presets(init_from, sections, overrides) as presets:
            composed = compose_dict([*presets, *overrides], name, schema, count_pieces)
        if not {"model", "model.vocab_size"} & stated_keys(overrides):
            _grow_vocabulary(composed, count_pieces)
        return composed
    check_form(overrides)
    _store_schema(name, schema)
    for kind in router_kinds():
        _store_router(kind, registered_router(kind).schema)
    try:
        with composed_folder(overrides) as (folder, named), initialize_config_dir(str(folder), version_base="1.3"):
            composed = compose(name, overrides=for_hydra(named), return_hydra_config=True)
    except UserError as error:
        raise ConfigError(str(error)) from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        around = cache(lambda: _around(overrides, name, schema))  # composes a second time: only where it is needed
        if any(re.match(r"\+*router\.", override) for override in overrides) and "router" in around():
            message = of_other_routers(around().router.kind, overrides)
        else:
            message = None
        raise ConfigError(message or explain(error, overrides, lambda: _keys(around()))) from error
    except yaml.MarkedYAMLError as error:
        where = f"{error.problem_mark.name}:{error.problem_mark.line + 1}" if error.problem_mark else "a preset"
        raise ConfigError(f"{where}: not valid YAML ({error.problem})") from error
    if _names_own_text(overrides) and composed.hydra.runtime.choices.get("data") == "stdlib":
        return compose_dict([*overrides, "data=files"], name, schema, count_pieces, read_source)
    HydraConfig.instance().set_config(composed)  # so that ${hydra:runtime.choices.*} resolves
    with flag_override(composed, ["struct", "readonly"], False):
        composed.pop("hydra")
    if read_source is not None and (init_from := composed.get("init_from")):  # a preset names it
        return compose_dict([f"init_from={init_from}", *overrides], name, schema, count_pieces, read_source)
    _fill_vocabulary(composed, count_pieces)
    return composed


@cache  # a schema is stored once in a process
def _store_schema(name: str, schema: type) -> None:
    ConfigStore.instance().store(name=f"{name}_schema", node=_typed(schema, router=None))


@cache
def _store_router(kind: str, schema: type) -> None:
    ConfigStore.instance().store(group="router", name=f"{kind}_schema", node=schema)


def _around(overrides: list[str], name: str, schema: type) -> DictConfig:
    """The defaults with the router and experiment that these overrides choose, without the others: one is wrong."""
    chosen = [one for one in overrides if re.match(r"\+*(router|experiment)=", one)]
    try:
        return compose_dict(chosen if chosen != overrides else [], name, schema) if overrides else OmegaConf.create({})
    except ConfigError:
        return compose_dict([], name, schema)


def _names_own_text(overrides: list[str]) -> bool:
    """Whether `data.path` is given without a `data=` preset; it then replaces the built-in text."""
    plain = [override.lstrip("+") for override in overrides]
    return any(one.startswith("data.path=") and one != "data.path=null" for one in plain) and not any(
        one.startswith("data=") for one in plain
    )


def _typed(schema: type, *, router: object) -> DictConfig:
    """The schema's defaults, with the options of router kind `router`. None, for composing, leaves the router's options
    (a preset sets them) and `model.vocab_size` (`_fill_vocabulary` sets it) missing."""
    node = OmegaConf.structured(schema)
    if "router" in node:
        node.router = MISSING if router is None else OmegaConf.structured(registered_router(router).schema)
    if "model" in node and router is None:
        node.model.vocab_size = MISSING
    return node


CountPieces = Callable[[TokenizerConfig], int]


def _fill_vocabulary(node: DictConfig, count_pieces: CountPieces | None) -> None:
    """Sets `model.vocab_size`, unless a preset or an override does, to the tokenizer's vocabulary size. If that size is
    itself defined as `model.vocab_size` (a tokenizer to be trained), sets the default.

    For an existing tokenizer it stays missing without `count_pieces`. Raises as `compose_dict` does.
    """
    if "model" not in node or not OmegaConf.is_missing(node.model, "vocab_size"):
        return
    tokenizer = node.tokenizer
    follows_model = OmegaConf.is_interpolation(tokenizer, "vocab_size")
    stated = None if follows_model else tokenizer.vocab_size
    if follows_model or stated is not None:
        # An invalid size is not copied, so that the error names tokenizer.vocab_size, not model.vocab_size.
        node.model.vocab_size = stated if stated is not None and stated > 0 else ModelConfig().vocab_size
        return
    existing = _existing(node)
    if count_pieces is not None:
        node.model.vocab_size = count_pieces(existing)


def _grow_vocabulary(node: DictConfig, count_pieces: CountPieces | None) -> None:
    """Enlarges `model.vocab_size` if the source's has no room for the added tokens. Raises as `compose_dict` does."""
    if count_pieces is not None and node.tokenizer.add_special_tokens:
        node.model.vocab_size = max(node.model.vocab_size, count_pieces(_existing(node)))


def _existing(node: DictConfig) -> TokenizerConfig:
    """The configuration of an existing tokenizer. Raises ConfigError."""
    try:
        return TokenizerConfig(**{str(key): node.tokenizer[key] for key in node.tokenizer})
    except UserError as error:
        raise ConfigError(str(error)) from error


def _keys(node: DictConfig | ListConfig) -> list[str]:
    tree: Any = OmegaConf.to_container(node, resolve=False)
    return dotted_keys(tree)


def to_config(node: DictConfig | ListConfig, overrides: list[str] | None = None) -> Any:
    """The checked dataclass: runs every dataclass's rules. Raises ConfigError."""
    try:
        missing = sorted(OmegaConf.missing_keys(node))
    except OmegaConfBaseException as error:  # an interpolation that can't be resolved
        raise ConfigError(explain(error, overrides or [], list)) from error
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be stated: {missing[0]}=…")
    try:
        return OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        cause = error.__cause__ if isinstance(error.__cause__, UserError) else error
        raise ConfigError(explain(cause, overrides or [], list)) from error
    except AttributeError as error:  # slots refuse a key that `+key=` added
        key = str(error).rpartition(" attribute ")[2].strip("'")
        if "router" in node and (message := of_other_routers(node.router.kind, overrides or [])):
            raise ConfigError(message) from error
        found = re.search(rf"(?m)^\+*((?:\w+\.)*{key})[.=]", "\n".join(overrides or []))
        raise ConfigError(no_such_key(found[1] if found else key, overrides or [], _keys(node))) from error
    except UserError as error:
        raise ConfigError(str(error)) from error


def load_config(
    overrides: list[str],
    name: str = "train",
    schema: type = Config,
    count_pieces: CountPieces | None = None,
    read_source: ReadSource | None = None,
) -> Any:
    """Compose and check. Raises as `compose_dict` does."""
    config = to_config(compose_dict(overrides, name, schema, count_pieces, read_source), overrides)
    if isinstance(config, Config):
        _check_can_be_saved(asdict(config), "")
        _check_best(config.checkpoint)
    return config


def _check_best(checkpoint: CheckpointConfig) -> None:
    """Not a rule of CheckpointConfig, since saved configurations that break it must still be read."""
    metric = checkpoint.metric_for_best_model
    if metric in AnswerMetric.__members__ and not checkpoint.greater_is_better:
        raise ConfigError(
            f"checkpoint.metric_for_best_model={metric} is a share of right answers, of which the smallest would be "
            "kept: set checkpoint.greater_is_better=true"
        )


def _check_can_be_saved(value: Any, key: str) -> None:
    """Raises ConfigError for a text that `read_config` would refuse."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for name, one in inner:
            _check_can_be_saved(one, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str) and INTERPOLATION in value:
        raise ConfigError(f"{key}={value}: must not have {INTERPOLATION}, which a saved configuration can't hold")


def to_yaml(config: Any) -> str:
    """A checked configuration as YAML that `read_config` can read."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def read_config(path: Path, schema: type = Config) -> Any:
    """Reads a run's config.yaml, also one that an earlier version wrote. Raises ConfigError naming the file."""
    defaults = OmegaConf.structured(schema)
    try:
        _, saved = read_saved(path)
    except (OSError, UserError) as error:
        raise ConfigError(str(error)) from error
    try:
        defaults = _typed(schema, router=saved_kind(saved.get("router")))
        return to_config(OmegaConf.merge(defaults, migrate(saved)))
    except (UserError, OmegaConfBaseException, TypeError) as error:
        router = saved.get("router")
        options = [f"router.{key}={value}" for key, value in router.items()] if isinstance(router, Mapping) else []
        message = of_other_routers(saved_kind(router), options) or explain(error, [], lambda: _keys(defaults))
        raise ConfigError(f"{path}: {message}") from error
