"""`moe ls` and `moe cp`: every preset is listed, a copy composes to the same configuration, nothing is overwritten."""

from pathlib import Path

import pytest

from moe.cli.presets import copy_preset, list_presets
from moe.config.compose import ConfigError, load_config
from moe.config.presets import add_config_dir, groups, presets


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("moe.config.presets._added_dirs", [])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_group_and_preset_is_listed(folder: Path) -> None:
    text = list_presets()
    for group in groups():
        line = next(line for line in text.splitlines() if line.split()[0] == group)
        assert line.split()[1:] == list(presets(group))
        assert [line.split()[0] for line in list_presets(group).splitlines()] == list(presets(group))


def test_presets_of_the_users_say_where_they_lie(folder: Path) -> None:
    path = folder / "mine" / "model" / "own.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# A model of mine. With a second sentence.\nhidden_size: 64\n")
    add_config_dir(folder / "mine")
    assert f"own            ({path}) A model of mine" in list_presets("model").splitlines()


def test_a_copy_is_the_same_preset(folder: Path) -> None:
    said = copy_preset("model/small", "mine.yaml")
    assert said == "mine.yaml: edit it, then `moe train model=mine.yaml`"
    assert load_config(["model=mine.yaml"]).model == load_config(["model=small"]).model
    (folder / "models").mkdir()
    copy_preset("model/tiny", "models")
    assert load_config(["model=models/tiny.yaml"]).model == load_config([]).model


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("model/smal", "x.yaml", "model/smal: model has .*did you mean model/small"),
        ("modle/small", "x.yaml", "modle: must be one of .*did you mean model"),
        ("model", "x.yaml", "model/?: model has mistral_7b"),
        ("model/small", "x.txt", "x.txt: must be a folder or end with .yaml"),
        ("model/small", "there.yaml", "there.yaml exists: choose another name"),
    ],
)
def test_a_mistake_is_one_line_and_overwrites_nothing(folder: Path, source: str, target: str, message: str) -> None:
    (folder / "there.yaml").write_text("keep: me\n")
    with pytest.raises(ConfigError, match=message):
        copy_preset(source, target)
    assert (folder / "there.yaml").read_text() == "keep: me\n"
    assert [path.name for path in folder.iterdir()] == ["there.yaml"]
