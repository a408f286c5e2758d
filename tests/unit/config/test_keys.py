"""What is found without Hydra is what composing finds, in the same words; what composes passes."""

from pathlib import Path

import omegaconf
import pytest

from moe.cli.verbs import SCHEMAS, schema
from moe.config import Config
from moe.config.compose import compose_dict, load_config
from moe.config.keys import _chosen_tree, check_names
from moe.config.presets import groups, presets
from moe.config.rules import MISSING
from moe.config.suggest import dotted_keys
from moe.errors import ConfigError


def _composed(overrides: list[str], verb: str) -> list[str]:
    composed = compose_dict(overrides, verb, schema(verb))
    return dotted_keys(omegaconf.OmegaConf.to_container(composed, resolve=False))  # type: ignore[arg-type]


def test_a_missing_value_is_omegaconfs() -> None:
    assert MISSING == omegaconf.MISSING


@pytest.mark.parametrize("verb", SCHEMAS)
def test_the_known_keys_are_those_of_the_composed_configuration(verb: str) -> None:
    tree = _chosen_tree([], verb, schema(verb))
    assert tree is not None
    assert dotted_keys(tree) == _composed([], verb)


@pytest.mark.parametrize("router", presets("router"))
def test_the_known_keys_have_the_options_of_the_chosen_router(router: str) -> None:
    tree = _chosen_tree([f"router={router}"], "train", Config)
    assert tree is not None
    assert dotted_keys(tree) == _composed([f"router={router}"], "train")


@pytest.mark.parametrize("verb", SCHEMAS)
def test_every_preset_and_every_key_there_is_passes(verb: str) -> None:
    keys = _composed([], verb)
    named = [f"{group}={preset}" for group in groups() for preset in presets(group) if group in keys]
    check_names([*named, *(f"{key}=???" for key in keys)], verb, schema(verb))


GOOD = [
    ["+modle=3"],  # what `+` adds is left to Hydra
    ["data.sources.mine.path=x", "~data.sources.prose"],
    ["router.layers.3.top_k=1", "router.schedules.z_loss_coef={0:0.1}", "model.rope_scaling.factor=2"],
    ["router=expert_choice", "router.top_k=2"],  # another router has this option
    ["router=topk_schema", "model=NULL", "hardware=h100"],
    ["train.precision=bfloat16", "optim.lr=inf", "checkpoint.background=off", "train.steps=???"],
    ["run_dir=a=b", "data.path=my file(1).txt", "data.path=${oc.env:HOME}"],
    ["experiment=mine.yaml", "model=mine.yaml"],
    ["modle=tiny", "init_from=runs/x"],  # what is there decides which keys there are
    ["experiment=quickstart", "modle=tiny"],
]


@pytest.mark.parametrize("overrides", GOOD, ids=str)
def test_what_composing_must_decide_passes(overrides: list[str]) -> None:
    check_names(overrides, "train", Config)


MISTAKES = [
    ["modl=tiny"],
    ["model.hiden_size=3"],
    ["modle.hidden_size=3"],
    ["model=tinny"],
    ["router=lossfre"],
    ["experiment=quick"],
    ["tracking=off"],
    ["lr=1e-3"],
    ["path=x"],
    ["data.sourcs.x.path=y"],
    ["router.top_kk=2"],
    ["router.capcity_factor=1.0", "router=gshard"],
    ["nothing_like_it=5"],
    ["train.step=5", "train.steps=4"],
    ["optim.lr=fast"],
    ["train.steps=many"],
    ["train.steps=true"],
    ["train.precision=fp16"],
    ["checkpoint.background=maybe"],
    ["router.norm_topk_prob=t"],
    ["router.top_k=two"],
    ["model.sliding_window=wide"],
]


@pytest.mark.parametrize("overrides", MISTAKES, ids=str)
def test_a_mistake_is_answered_in_the_words_of_the_composed_one(overrides: list[str]) -> None:
    with pytest.raises(ConfigError) as composed:
        load_config(overrides)
    with pytest.raises(ConfigError) as found:
        check_names(overrides, "train", Config)
    assert str(found.value) == str(composed.value)


def test_a_preset_of_the_users_own_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "configs" / "model"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("hidden_size: 64\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    check_names(["model=mine"], "train", Config)
    with pytest.raises(ConfigError, match="model=mime must be one of mine, mistral_7b"):
        check_names(["model=mime"], "train", Config)
