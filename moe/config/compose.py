"""From `key=value` overrides to a checked `Config`: Hydra composes, the dataclasses check."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from moe.config import Config
from moe.config.migrate import check_overrides, migrate
from moe.config.router import registered_router, router_kinds, saved_kind
from moe.config.rules import require
from moe.config.suggest import closest, dotted_keys, no_such_key
from moe.errors import UserError


class ConfigError(UserError):
    """A configuration that can't be used; the text is one line for the user."""


def config_dir() -> Path:
    """The shipped YAML: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


_added_dirs: list[Path] = []


def add_config_dir(folder: Path) -> None:
    """From now on presets are also looked for in this folder, which is laid out as configs/ is."""
    if folder.resolve() not in _added_dirs:
        _added_dirs.append(folder.resolve())


def choices(group: str) -> list[str]:
    """Names that `group=NAME` accepts."""
    return sorted({path.stem for root in (config_dir(), *_added_dirs) for path in (root / group).glob("*.yaml")})


def groups() -> list[str]:
    return sorted(path.name for path in config_dir().iterdir() if path.is_dir())


_HINTS = {
    "hardware": "; or describe yours: hardware=custom hardware.gpus_per_node=4 hardware.memory_gb=48 … "
    "(`moe plan hardware=custom` names what is missing)",
}


def _one_line(error: BaseException, overrides: list[str], known: list[str]) -> str:
    """Hydra's and OmegaConf's many-line messages as one: the key, the value, the rule. `known`: the keys there are."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if text.startswith("Error merging override") and error.__cause__ is not None:
        override = text.removeprefix("Error merging override ").lstrip("+~")
        cause = str(error.__cause__)
        section, _, value = override.partition("=")
        if cause.startswith("Invalid type assigned: str"):  # a group's name where no group is
            keys = ", ".join(key for key in known if key.startswith(f"{section}."))
            return f"{override}: there is no preset {value}; {section} is set by its keys, {keys}"
        return f"{override}: {_one_line(error.__cause__, [], known)}"
    missing = re.match(r"In '.*': Could not (find|load) '(?P<group>\w+)/(?P<name>[^']*)'", text)
    if missing:
        group, name = missing["group"], missing["name"]
        if group == "router" and name.endswith("_schema"):  # named by a YAML's defaults
            kind = name.removesuffix("_schema")
            return f"router.kind={kind} must be one of {', '.join(router_kinds())}: import the module that registers it"
        near = closest(name, choices(group))
        meant = f"; did you mean {group}={near}?" if near else ""
        return f"{group}={name} must be one of {', '.join(choices(group))}{meant}{_HINTS.get(group, '')}"
    full = re.search(r"full_key: (\S+)", f"{error}\n{error.__cause__}")
    key = full[1] if full else ""
    unknown = re.match(r"(Could not override|Key) '(?P<key>[^']+)'", text)
    if unknown:
        return no_such_key(key or unknown["key"], overrides, known)
    given = next((override for override in overrides if key and override.lstrip("+~").startswith(f"{key}=")), key)
    return f"{given}: {text}" if given else text


def compose_dict(overrides: list[str], name: str = "train", schema: type = Config) -> DictConfig:
    """The composed, typed, not yet checked configuration. Raises ConfigError."""
    for override in overrides:
        if not re.match(r"~|[^=]+=", override):
            raise ConfigError(f"{override}: must be key=value, as in model=small or train.steps=100")
        if override.startswith("~") and not re.fullmatch(r"~data\.sources\.[^.=]+", override):
            raise ConfigError(
                f"{override}: only a source can be taken out (~data.sources.NAME); all else has a value, so state "
                "another: GROUP=NAME or KEY=VALUE"
            )
    try:
        check_overrides(overrides)
    except UserError as error:
        raise ConfigError(str(error)) from error
    hydras = [override for override in overrides if override.lstrip("+~").startswith(("hydra.", "hydra/", "hydra="))]
    if hydras:
        raise ConfigError(f"{hydras[0]}: Hydra's own settings are not read here; `moe {name} --help` lists the keys")
    store = ConfigStore.instance()
    store.store(name=f"{name}_schema", node=_typed(schema, router=None))
    for kind in router_kinds():
        store.store(group="router", name=f"{kind}_schema", node=registered_router(kind).schema)
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = compose(name, overrides=[*overrides, *_search_path()], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        known = _keys(compose_dict([], name, schema)) if overrides else []
        raise ConfigError(_one_line(error, overrides, known)) from error
    if _names_own_text(overrides) and composed.hydra.runtime.choices.get("data") == "stdlib":
        return compose_dict([*overrides, "data=files"], name, schema)
    HydraConfig.instance().set_config(composed)  # so that ${hydra:runtime.choices.*} resolves
    with flag_override(composed, ["struct", "readonly"], False):
        composed.pop("hydra")
    return composed


def _names_own_text(overrides: list[str]) -> bool:
    """`data.path=…` is set and no `data=` preset: then it takes the place of the built-in text."""
    plain = [override.lstrip("+") for override in overrides]
    return any(one.startswith("data.path=") and one != "data.path=null" for one in plain) and not any(
        one.startswith("data=") for one in plain
    )


def _search_path() -> list[str]:
    """Quoted: a folder's name may hold spaces and commas."""
    folders = json.dumps([f"file://{folder}" for folder in _added_dirs], ensure_ascii=False)
    return [f"hydra.searchpath={folders}"] if _added_dirs else []


def _typed(schema: type, *, router: object) -> DictConfig:
    """The schema's defaults, with the options of the router of that kind; with None, a preset brings them."""
    node = OmegaConf.structured(schema)
    if "router" in node:
        node.router = "???" if router is None else OmegaConf.structured(registered_router(router).schema)
    return node


def _keys(node: DictConfig | ListConfig) -> list[str]:
    tree: Any = OmegaConf.to_container(node, resolve=False)
    return dotted_keys(tree)


def to_config(node: DictConfig | ListConfig, overrides: list[str] | None = None) -> Any:
    """Runs every dataclass's rules. Raises ConfigError."""
    try:
        missing = sorted(OmegaConf.missing_keys(node))
    except OmegaConfBaseException as error:  # an interpolation that can't be resolved
        raise ConfigError(_one_line(error, overrides or [], [])) from error
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be stated: {missing[0]}=…")
    try:
        return OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        cause = error.__cause__ if isinstance(error.__cause__, UserError) else error
        raise ConfigError(_one_line(cause, overrides or [], [])) from error
    except AttributeError as error:  # slots refuse a key that `+key=` added
        key = str(error).rpartition(" attribute ")[2].strip("'")
        found = re.search(rf"(?m)^\+*((?:\w+\.)*{key})[.=]", "\n".join(overrides or []))
        raise ConfigError(no_such_key(found[1] if found else key, overrides or [], _keys(node))) from error
    except UserError as error:
        raise ConfigError(str(error)) from error


def load_config(overrides: list[str], name: str = "train", schema: type = Config) -> Any:
    """Compose and check. Raises ConfigError."""
    return to_config(compose_dict(overrides, name, schema), overrides)


def to_yaml(config: Any) -> str:
    """A checked configuration as YAML that `read_config` takes back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def read_config(path: Path, schema: type = Config) -> Any:
    """A run's config.yaml, also that of an earlier version. Raises ConfigError naming the file."""
    defaults = OmegaConf.structured(schema)
    try:
        saved: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        require(isinstance(saved, dict), "must be a mapping of keys")
        defaults = _typed(schema, router=saved_kind(saved.get("router")))
        return to_config(OmegaConf.merge(defaults, migrate(saved)))
    # YAML's reader is one that makes no objects: a tag that asks for one is an error too.
    except (OSError, UserError, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise ConfigError(f"{path}: {_one_line(error, [], _keys(defaults))}") from error
