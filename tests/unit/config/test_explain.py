"""Errors for mistakes on the command line: the override as typed, the rule and the fix, in one line without Hydra's
terms."""

import pytest

from moe.config.compose import ConfigError, load_config

MISTAKES = [
    (["train.steps=1,2"], "train.steps=1,2 must be a whole number"),
    (["train.steps=range(1,2)"], "train.steps=range(1,2) must be a whole number"),
    (["optim.lr=fast"], "optim.lr=fast must be a number"),
    (["checkpoint.background=maybe"], "checkpoint.background=maybe must be true or false"),
    (["train.precision=fp8"], "train.precision=fp8 must be one of float32, bfloat16"),
    (["train.steps=null"], "train.steps=null must have a value, not null"),
    (["optim.betas=3"], "optim.betas=3 must be a list, as in KEY=[…], not one int"),
    (["data.sources=x"], "data.sources=x must be a mapping, as in KEY={…}, not one str"),
    (["optim=3"], "optim=3 must be one of adamw, muon"),
    (["parallel=3"], "parallel=3 must be a section with keys, not one int"),
    (["run_dir={a:b}"], "run_dir={a:b} must be text, not a dict"),
    (
        ["run_dir=${oc.env:MOE_NOT_SET}"],
        "run_dir=${oc.env:MOE_NOT_SET}: the environment variable MOE_NOT_SET is not set",
    ),
    (["router=topk,topk"], "router=topk,topk must be one of "),
    (["model=null"], "model=null must be one of mistral_7b"),
    (["model=small", "model=null"], "model=null must be one of mistral_7b"),
    (["+model=small"], "+model=small: model is chosen already: choose it once, without `+`"),
    (["experiment=quickstart", "+experiment=quickstart"], "experiment is chosen already: choose it once, without `+`"),
    (["x y=3"], "x y=3: no such key"),
    (["train..steps=3"], "train..steps=3: no such key; did you mean train.steps=3?"),
    (["trian.steps=1"], "trian.steps=1: no such key; did you mean train.steps=1?"),
]


@pytest.mark.parametrize(("overrides", "expected"), MISTAKES, ids=lambda value: str(value)[:40])
def test_the_line_says_what_was_typed_and_the_rule(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    text = str(caught.value)
    assert expected in text
    assert len(text.splitlines()) == 1
    assert not any(
        term in text for term in ("Lexer", "mismatched", "viable", "defaults list", "--multirun", "DictConfig")
    )
    assert all(text.count(override) == 1 for override in overrides if override in text), "said twice"
