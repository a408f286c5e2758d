"""The benchmarks that need ranks run for real at a small shape and end with the line they promise."""

from __future__ import annotations

import contextlib
import io
import re

from moe.bench import run_bench
from tests.ranks import run_ranks

SMALL = [
    "rounds=2", "steps=2", "model=tiny", "model.vocab_size=320", "model.hidden_size=32", "model.num_hidden_layers=1",
    "tokenizer.vocab_size=300", "train.sequence_length=16", "train.micro_batch_size=2", "train.global_batch_size=4",
]  # fmt: skip


def _bench(overrides: list[str]) -> list[str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run_bench(overrides)
    return out.getvalue().splitlines()


def test_saving_ends_with_the_share_that_training_waited() -> None:
    main, other = run_ranks(2, _bench, ["saving", *SMALL])
    assert any(re.match(r"saved .*step_00000002: \d+ MB a rank", line) for line in main)
    assert re.fullmatch(r"training waited \d+\.\d\d % of an interval", main[-1])
    assert other == []


def test_expert_parallel_ends_with_the_ratio() -> None:
    main, _ = run_ranks(2, _bench, ["expert_parallel", *SMALL])
    assert float(main[-1].removeprefix("ratio tokens/s ")) > 0
