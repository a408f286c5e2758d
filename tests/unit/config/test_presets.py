"""The shipped presets: parameter counts on the meta device against the published integers, and no repeated default."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from moe.config import Config, HardwareConfig, SourceConfig
from moe.config.compose import config_dir, load_config
from moe.model.transformer import Transformer
from moe.plan import count_parameters

PUBLISHED = {  # Mixtral's and Mistral's own checkpoints
    "mixtral_8x7b": (46_702_792_704, 12_879_925_248),
    "mixtral_8x22b": (140_630_071_296, None),
    "mistral_7b": (7_241_732_096, 7_241_732_096),
}


def compose(*overrides: str) -> Config:
    return load_config(["tokenizer=mistral", *overrides])


def on_meta(config: Config) -> Transformer:
    with torch.device("meta"):
        return Transformer(config.model, config.router, config.experts)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_integers(preset):
    config = compose(f"model={preset}")
    model = on_meta(config)
    total, active = PUBLISHED[preset]
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    assert count_parameters(config)[0] == total
    assert active is None or count_parameters(config)[1] == active


@pytest.mark.parametrize(
    "overrides", [["model=tiny", "tokenizer=sentencepiece"], ["model=small", "tokenizer=sentencepiece"]]
)
def test_small_presets_build(overrides):
    config = load_config(overrides)
    assert sum(p.numel() for p in on_meta(config).parameters()) == count_parameters(config)[0]


def test_presets_share_no_head_dim():
    """The schema's default model has a head dimension of its own, which no preset may inherit."""
    assert compose("model=mixtral_8x7b").model.head_size == 128
    assert compose("model=mixtral_8x7b", "model.head_dim=64").model.head_size == 64


def test_windows_are_the_published_ones():
    assert compose("model=mistral_7b").model.sliding_window == 4096
    assert compose("model=mixtral_8x7b").model.sliding_window is None


def repeated(stated: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys of `stated` that say what `defaults` say."""
    found = []
    for key, value in stated.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            found += repeated(value, default, f"{prefix}{key}.")
        elif key in defaults and value == default:
            found.append(f"{prefix}{key}")
    return found


def plain(schema: type) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.structured(schema), enum_to_str=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


@pytest.mark.parametrize(
    "path",
    sorted(config_dir().rglob("*.yaml")),
    ids=lambda p: p.stem,
)
def test_yaml_says_only_what_differs_from_the_dataclasses(path: Path):
    text = path.read_text(encoding="utf-8")
    stated = yaml.safe_load(text) or {}
    whole = plain(Config) | {"hardware": plain(HardwareConfig)}
    group = None if text.startswith("# @package _global_\n") else path.parent.name
    defaults = whole.get(group, whole)
    assert repeated(stated, defaults) == []
    for source in stated.get("data", stated).get("sources", {}).values():
        assert repeated(source, plain(SourceConfig)) == []


def test_a_repeated_default_is_found():
    assert repeated({"optim": {"lr": 1e-3, "eps": 1.0}, "run_dir": "x"}, plain(Config)) == ["optim.lr"]
