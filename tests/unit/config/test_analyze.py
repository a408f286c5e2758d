"""`moe analyze`'s configuration: which text it means, and what is refused."""

from __future__ import annotations

import pytest

from moe.config import AnalyzeConfig, DataConfig
from moe.config.compose import ConfigError, load_config

RUN = DataConfig(path="books.txt", held_out=0.2, cache_dir="there")


def load(*overrides: str) -> AnalyzeConfig:
    return load_config(["checkpoint=run", *overrides], "analyze", AnalyzeConfig)


def test_the_runs_text_unless_another_is_stated() -> None:
    assert load().text_of(RUN) == RUN
    assert load("data.cache_dir=here").text_of(RUN) == DataConfig(path="books.txt", held_out=0.2, cache_dir="here")
    assert list(load("data=stdlib").text_of(RUN).all_sources()) == ["python", "prose", "arithmetic"]
    assert load("data.path=other.txt", "data.held_out=0.5").text_of(RUN) == DataConfig(path="other.txt", held_out=0.5)
    assert list(load("data=stdlib", "~data.sources.prose").text_of(RUN).all_sources()) == ["python", "arithmetic"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["checkpoint=' '"], "checkpoint='' must name a run directory"),
        (["data.held_out=0.5"], "data.held_out=0.5 needs a source"),
        (["data.format=jsonl"], "data.format=jsonl needs a source"),
        (["analyze.sequences=1"], "analyze.sequences=1 must be ≥ 2"),
        (["analyze.permutations=0"], "analyze.permutations=0 must be > 0"),
        (["analyze.leave_out_tokens=-1"], "analyze.leave_out_tokens=-1 must be ≥ 0"),
        (["analyze.token=1"], "analyze.token=1: no such key; did you mean analyze.tokens=1?"),
    ],
)
def test_what_is_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert expected in str(caught.value)
