"""Values that Hydra's grammar would reject, trim or split are used exactly as typed."""

import pytest

from moe.config.compose import load_config
from moe.config.overrides import for_hydra

TEXTS = [
    "a,b",
    "my file(1).txt",
    "it's",
    "é/日本",
    "a=b",
    "'x",
    "[a",
    "a\\",
    "back\\'slash,",
    "two\nlines",
    "{",
    "*.txt",
    "a b",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_arrives_as_typed(text: str) -> None:
    assert load_config(["data=files", f"data.path={text}"]).data.path == text
    assert load_config([f"train.sample_prompt={text}"]).train.sample_prompt == text


def test_what_hydra_understands_stays() -> None:
    overrides = [
        "optim.betas=[0.9,0.95]",
        "run_dir='a, b'",
        "train.steps=3",
        "~experiment",
        "x=${y}",
        "+data.sources.a={path: x}",
    ]
    assert for_hydra(overrides) == overrides
    assert load_config(["run_dir=runs/${train.seed}"]).run_dir == "runs/0"
