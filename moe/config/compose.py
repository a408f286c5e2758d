"""From `key=value` overrides to a checked `Config`: Hydra composes, the dataclasses check."""

from __future__ import annotations

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
from moe.errors import UserError


class ConfigError(UserError):
    """A configuration that can't be used; the text is one line for the user."""


def config_dir() -> Path:
    """The shipped YAML: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def choices(group: str) -> list[str]:
    """Names that `group=NAME` accepts."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def groups() -> list[str]:
    return sorted(path.name for path in config_dir().iterdir() if path.is_dir())


_HINTS = {
    "hardware": "; or describe yours: hardware=custom hardware.gpus_per_node=4 hardware.memory_gb=48 … "
    "(`moe plan hardware=custom` names what is missing)",
}


def _one_line(error: BaseException, overrides: list[str]) -> str:
    """Hydra's and OmegaConf's many-line messages as one: the key, the value, the rule."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if text.startswith("Error merging override") and error.__cause__ is not None:
        override = text.removeprefix("Error merging override ").lstrip("+~")
        return f"{override}: {_one_line(error.__cause__, [])}"
    missing = re.match(r"In '.*': Could not find '(?P<group>\w+)/(?P<name>.*)'", text)
    if missing:
        group = missing["group"]
        return f"{group}={missing['name']} must be one of {', '.join(choices(group))}{_HINTS.get(group, '')}"
    unknown = re.match(r"(Could not override|Key) '(?P<key>[^']+)'", text)
    if unknown:
        key = unknown["key"]
        given = next((override for override in overrides if override.lstrip("+~").startswith(f"{key}=")), key)
        return f"{given}: no such key; `moe train --cfg job` lists them all"
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    given = next((override for override in overrides if key and override.lstrip("+~").startswith(f"{key}=")), key)
    return f"{given}: {text}" if given else text


def compose_dict(overrides: list[str], name: str = "train", schema: type = Config) -> DictConfig:
    """The composed, typed, not yet checked configuration. Raises ConfigError."""
    hydras = [override for override in overrides if override.lstrip("+~").startswith(("hydra.", "hydra/", "hydra="))]
    if hydras:
        raise ConfigError(f"{hydras[0]}: Hydra's own settings are not read here; `moe train --cfg job` lists the keys")
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = compose(name, overrides=overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_one_line(error, overrides)) from error
    HydraConfig.instance().set_config(composed)  # so that ${hydra:runtime.choices.*} resolves
    with flag_override(composed, ["struct", "readonly"], False):
        composed.pop("hydra")
    return composed


def to_config(node: DictConfig | ListConfig, overrides: list[str] | None = None) -> Any:
    """Runs every dataclass's rules. Raises ConfigError."""
    try:
        missing = sorted(OmegaConf.missing_keys(node))
    except OmegaConfBaseException as error:  # an interpolation that can't be resolved
        raise ConfigError(_one_line(error, overrides or [])) from error
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be stated: {missing[0]}=…")
    try:
        return OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        cause = error.__cause__ if isinstance(error.__cause__, UserError) else error
        raise ConfigError(_one_line(cause, overrides or [])) from error
    except AttributeError as error:  # slots refuse a key that `+key=` added
        key = str(error).rpartition(" attribute ")[2].strip("'")
        given = next((override for override in overrides or [] if re.search(rf"(^|[.+]){key}=", override)), key)
        raise ConfigError(f"{given.lstrip('+')}: no such key; `moe train --cfg job` lists them all") from error
    except UserError as error:
        raise ConfigError(str(error)) from error


def load_config(overrides: list[str], name: str = "train", schema: type = Config) -> Any:
    """Compose and check. Raises ConfigError."""
    return to_config(compose_dict(overrides, name, schema), overrides)


def to_yaml(config: Any) -> str:
    """A checked configuration as YAML that `read_config` takes back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def read_config(path: Path, schema: type = Config) -> Any:
    """A run's config.yaml. Raises ConfigError naming the file."""
    try:
        return to_config(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path)))
    # YAML's reader is one that makes no objects: a tag that asks for one is an error too.
    except (OSError, ConfigError, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise ConfigError(f"{path}: {_one_line(error, [])}") from error
