"""`router.kind` decides the schema: on the command line, in YAML beside the package, and in a run's config.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from moe.config import RouterConfig, TopKRouterConfig, presets
from moe.config.compose import ConfigError, load_config, read_config, to_yaml
from moe.config.presets import choices
from moe.config.router import register_router
from moe.plan import count_parameters
from moe.report.facts import brief, parameters
from moe.report.reader import read_run
from tests.bias_router.router import BiasRouterConfig, install

install()


def test_the_default_is_topk() -> None:
    assert load_config([]).router == TopKRouterConfig()


def test_yaml_outside_the_package_composes_with_its_own_dataclass() -> None:
    assert {"bias", "topk"} <= set(choices("router"))
    assert load_config(["router=bias", "router.rate=0.5"]).router == BiasRouterConfig(rate=0.5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["router=bias", "router.capacity_factor=1"],
            "router.capacity_factor=1: bias routers have no capacity_factor; ",
        ),
        (
            ["router=bias", "+router.capacity_factor=1"],
            "router.capacity_factor=1: bias routers have no capacity_factor;",
        ),
        (["router.rate=1"], "router.rate=1: topk routers have no rate; bias routers do"),
        (
            ["router=expert_choice", "router.top_k=2", "train.steps=5"],
            "router.top_k=2: expert_choice routers have no top_k; bias, group_limited, gumbel, noisy_topk, topk",
        ),
        (
            ["router=olmoe", "router.n_group=2"],
            "router.n_group=2: topk routers have no n_group; group_limited routers do",
        ),
        (["router.ratte=1"], "router.ratte=1: no such key"),
        (["router=bias", "router.rate=0"], "router.rate=0.0 must be > 0"),
        (["router=bias", "router.num_experts=0"], "router.num_experts=0 must be > 0"),
        (["router=biass"], "topk; did you mean router=bias?"),
        (["router.kind=bias"], "router.kind=bias must be chosen by a preset (router=topk)"),
    ],
)
def test_what_a_router_does_not_have_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("overrides", [["router=bias", "router.rate=0.5"], ["router.capacity_factor=1.5"]])
def test_a_saved_configuration_is_read_as_the_same_class(overrides: list[str], tmp_path: Path) -> None:
    config, path = load_config(overrides), tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    read = read_config(path)
    assert read == config
    assert type(read.router) is type(config.router)


def _saved(tmp_path: Path, overrides: list[str], old: str, new: str) -> Path:
    path = tmp_path / "config.yaml"
    text = to_yaml(load_config(overrides))
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def test_a_run_of_before_kinds_is_topk(tmp_path: Path) -> None:
    path = _saved(tmp_path, ["router.top_k=3"], "  kind: topk\n  num_experts", "  num_experts")
    assert read_config(path).router == TopKRouterConfig(top_k=3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: topk", "kind: other", "router.kind=other must be one of "),
        ("  top_k: 2", "  rate: 2", "router.rate=2: topk routers have no rate; bias routers do"),
    ],
)
def test_a_saved_router_that_is_not_known_is_named_with_the_file(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    path = _saved(tmp_path, [], old, new)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(path)
    assert str(caught.value).startswith(str(path))


@dataclass(kw_only=True, slots=True)
class OtherNamesConfig(RouterConfig):
    """A router whose options aren't called as those of topk."""

    kind: str = "other_names"
    chosen: int = 2

    @property
    def experts_per_token(self) -> int:
        return self.chosen

    def parameter_names(self) -> tuple[str, ...]:
        return "weight", "other_weight"


def test_sizes_ask_the_config_what_a_token_uses(tmp_path: Path) -> None:
    """Plan and report count by the configuration alone, whatever the router's own keys are called."""
    register_router("other_names", OtherNamesConfig, "nowhere:Nothing")
    path = tmp_path / "config.yaml"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "max_violation": 0.5}\n')
    config = load_config([])
    for chosen in (1, 3):
        config.router = OtherNamesConfig(chosen=chosen)
        path.write_text(to_yaml(config))
        run = read_run(tmp_path)
        found = parameters(run)
        assert found is not None
        assert (found.total, found.active) == count_parameters(config)
        assert f"8 experts, {chosen} a token (other_names)" in brief(run)
    path.write_text(path.read_text().replace("kind: other_names", "kind: foreign"))
    foreign = read_run(tmp_path)
    assert parameters(foreign) is None, "the size of a router that isn't known here is not guessed"
    assert "sparse" in brief(foreign)


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of presets whose name needs quoting."""
    monkeypatch.setattr(presets, "_added_dirs", [])
    folder = tmp_path / 'my presets, "mine"'
    (folder / "router").mkdir(parents=True)
    presets.add_config_dir(folder)
    return folder


def test_a_folder_of_presets_may_have_any_name(added: Path) -> None:
    (added / "router" / "quick.yaml").write_text("defaults:\n  - bias_schema\nrate: 0.25\n")
    assert load_config(["router=quick"]).router == BiasRouterConfig(rate=0.25)
    assert {"quick", "topk"} <= set(choices("router"))


def test_a_preset_of_a_router_that_nobody_registered_says_what_is_missing(added: Path) -> None:
    (added / "router" / "new.yaml").write_text("defaults:\n  - new_schema\n")
    with pytest.raises(
        ConfigError, match=r"^router.kind=new must be one of .*topk: import the module that registers it"
    ):
        load_config(["router=new"])
