"""The shipped presets: parameter counts on the meta device equal the published ones, and no YAML repeats a default."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from moe.config import Config, HardwareConfig, SourceConfig, SweepConfig
from moe.config.compose import ConfigError, load_config
from moe.config.presets import add_config_dir, config_dir, groups, presets
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
    """No preset inherits the head dimension of the schema's default model."""
    assert compose("model=mixtral_8x7b").model.head_size == 128
    assert compose("model=mixtral_8x7b", "model.head_dim=64").model.head_size == 64


def test_windows_are_the_published_ones():
    assert compose("model=mistral_7b").model.sliding_window == 4096
    assert compose("model=mixtral_8x7b").model.sliding_window is None


def repeated(stated: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys of `stated` whose values equal those of `defaults`."""
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


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with presets; it is the working directory."""
    monkeypatch.setattr("moe.config.presets._added_dirs", [])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_local_and_added_folders_override_the_shipped_presets(own: Path):
    write(own / "configs" / "model" / "mine.yaml", "hidden_size: 64\n")
    write(own / "configs" / "model" / "tiny.yaml", "hidden_size: 96\n")
    write(own / "configs" / "train.yaml", "run_dir: not read\n")
    assert load_config(["model=mine"]).model.hidden_size == 64
    assert load_config([]).model.hidden_size == 96
    assert load_config([]).model.sliding_window is None, "a preset replaces the shipped one, it isn't merged with it"
    write(own / "more" / "model" / "tiny.yaml", "hidden_size: 128\nsliding_window: 7\n")
    add_config_dir(own / "more")
    assert (load_config([]).model.hidden_size, load_config(["model=mine"]).model.hidden_size) == (128, 64)
    assert load_config(["model=mine"]).run_dir == "runs/mine-stdlib"
    assert presets("model")["tiny"] == own / "more" / "model" / "tiny.yaml"


def test_a_file_is_a_preset(own: Path):
    path = write(own / "some where" / "mine.yaml", "hidden_size: 64\n")
    assert load_config([f"model={path}"]).model.hidden_size == 64
    write(own / "fast.yaml", "# @package _global_\ntrain:\n  steps: 7\nmodel:\n  hidden_size: 32\n")
    config = load_config(["experiment=fast.yaml", f"model={path}"])
    assert (config.train.steps, config.model.hidden_size, config.run_dir) == (7, 32, "runs/mine-stdlib")


@pytest.mark.parametrize("group", groups())
def test_every_group_takes_a_copy_of_its_presets(own: Path, group: str):
    for name, path in presets(group).items():
        needed = {name: ["data.path=x"] for name in ("files", "sft")}
        needed |= {"mistral": ["model.vocab_size=32000"], "lora": ["init_from=x"]}
        needed |= {kind: ["tokenizer.path=x", "model.vocab_size=9"] for kind in ("model_file", "huggingface")}
        copied = write(own / f"{name}_copy.yaml", path.read_text(encoding="utf-8"))
        composed_as = ("sweep", SweepConfig) if group == "sweep" else ("train", Config)
        if group != "hardware":
            assert load_config([f"{group}={copied}", *needed.get(name, [])], *composed_as)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hidden_sizee: 3", "model=mine.yaml: model.hidden_sizee: no such key; did you mean model.hidden_size?"),
        ("hidden_size: abc", "model=mine.yaml: model.hidden_size must be a whole number"),
        ("hidden_size: null", "model=mine.yaml: model.hidden_size must have a value, not null"),
        ("mlp: thick", "model=mine.yaml: model.mlp must be one of dense, sparse"),
        ("a: [", "mine.yaml:2: not valid YAML (expected the node content, but found '<stream end>')"),
        ("- 3", "mine.yaml: must be a mapping of keys, as in hidden_size: 256"),
        ("42", "mine.yaml: must be a mapping of keys"),
        ("!!python/object:os.system x", "mine.yaml:1: not valid YAML (could not determine a constructor"),
        ("\udcff", "mine.yaml: byte 0 isn't UTF-8"),
    ],
)
def test_a_bad_preset_is_one_line_with_its_file(own: Path, text: str, message: str):
    (own / "mine.yaml").write_bytes(f"{text}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        load_config(["model=mine.yaml"])
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_without_presets_is_an_error(own: Path):
    (own / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: has no folder named after a group"):
        add_config_dir(own / "empty")
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        add_config_dir(own / "nowhere")
    with pytest.raises(ConfigError, match=r"^model=gone.yaml: no such file; `moe ls model` lists presets$"):
        load_config(["model=gone.yaml"])
