"""A saved configuration is plain values: no interpolation is resolved, no alias multiplied, nothing nested deep."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe.config.compose import ConfigError, load_config, read_config, to_yaml
from moe.config.saved import read_saved
from moe.errors import UserError
from moe.report.page import write_report

BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)
)
REFUSED = {
    "interpolation": ("run_dir: ${oc.env:SECRET}\n", "config.yaml:1: ${oc.env:SECRET} is an interpolation"),
    "in a list": ("a: 1\nb: [x, 'y ${c}']\n", "config.yaml:2: y ${c} is an interpolation"),
    "as a key": ("a:\n  ${oc.env:SECRET}: 1\n", "config.yaml:2: ${oc.env:SECRET} is an interpolation"),
    "broken interpolation": ("a: ${\n", "config.yaml:1: ${ is an interpolation"),
    "aliases": (BOMB, "config.yaml:2: *a is an alias"),
    "itself": ("a: &a [*a]\n", "config.yaml:1: *a is an alias"),
    "depth": ("a: " + "[" * 100, "config.yaml:1: values nested more than 16 deep"),
    "depth of mappings": ("".join(f"{' ' * n}a:\n" for n in range(100)), "nested more than 16 deep"),
    "size": ("a: " + "x" * (1 << 18), "config.yaml: has 262,147 bytes, and at most 262,144 are read"),
    "more depth": ("a: " + "[" * 5000, "config.yaml: not readable as YAML"),
    "digits": ("a: " + "9" * 6000, "config.yaml: not readable as YAML"),
    "a tag": ("a: !!python/object/apply:os.getcwd []\n", "config.yaml: not readable as YAML"),
    "a list": ("- a\n", "config.yaml: not a mapping of keys"),
    "bytes": ("a: \udcff\n", "config.yaml: byte 3 isn't UTF-8"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", REFUSED)
def test_a_config_of_somebody_else_is_refused_in_one_line(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    text, message = REFUSED[name]
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lm_loss": 1.0}\n')
    for read, error in (
        (read_saved, UserError),
        (read_config, ConfigError),
        (lambda _: write_report(tmp_path), UserError),
    ):
        with pytest.raises(error) as caught:
            read(path)
        assert message in str(caught.value)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
        assert "hunter2" not in str(caught.value)


def test_what_a_run_saves_is_read_again(tmp_path: Path) -> None:
    config = load_config(["model=small", "train.sample_prompt='a: *b & !c'"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path / "config.yaml") == config


def test_a_text_that_could_not_be_read_again_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match=r"^train.sample_prompt=\$\{x\}: must not have \$\{"):
        load_config([r"train.sample_prompt='\${x}'"])
