"""`moe bench scale` on tiny sizes: its keys, its tables and its last line; exponents of exact power laws."""

from __future__ import annotations

import contextlib
import io
from itertools import pairwise

import pytest

from moe.bench import run_bench, scale
from moe.config.compose import load_config
from moe.errors import UserError
from moe.plan import flops_per_token
from tests.ranks import run_ranks

TINY = [
    "rounds=1", "steps=1", "model.vocab_size=320", "model.hidden_size=32", "model.intermediate_size=48",
    "model.num_hidden_layers=1", "tokenizer.vocab_size=300",
]  # fmt: skip


def _printed() -> str:
    patch = pytest.MonkeyPatch()
    patch.setattr(scale, "TOKENS", 64)
    patch.setattr(scale, "LENGTHS", (8, 16, 32))
    patch.setattr(scale, "WINDOW", 4)
    patch.setattr(scale, "series", lambda every=scale.series: every()[:2])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_bench(["scale", *TINY])
    return printed.getvalue()


def test_every_size_is_measured() -> None:
    lines = run_ranks(1, _printed)[0].splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == [
        "sequence length, all keys seen", "sequence length, window 4",
    ]  # fmt: skip
    assert [int(line[:36].split()[-1]) for line in lines[3:9]] == [8, 16, 32, 8, 16, 32]
    assert float(lines[-1].removeprefix("largest difference of exponents ")) == pytest.approx(
        max((float(line.split()[-1]) for line in lines[10:12]), key=abs), abs=0.006
    )


def test_each_series_doubles_its_size_and_keeps_the_rest() -> None:
    for each in scale.series():
        sizes = list(each.sizes)
        assert [b / a for a, b in pairwise(sizes)] == [2] * (len(sizes) - 1)
        configs = [load_config([*scale.DEFAULTS, *own]) for own in each.sizes.values()]
        tokens = {one.train.global_batch_size * one.train.sequence_length for one in configs}
        assert tokens == (set(sizes) if each.name == "tokens a step" else {4096})
        assert {one.router.experts_per_token for one in configs} == {2}
        growth = flops_per_token(configs[-1]) / flops_per_token(configs[0])
        assert growth > 2 if each.name.endswith("all keys seen") else 1 <= growth < 1.05


def test_the_exponent_of_a_power_law_is_exact() -> None:
    assert scale.exponent({n: 3 * n**0.75 for n in (2, 4, 8, 16)}) == pytest.approx(0.75)
    assert scale.exponent({n: 5.0 for n in (2, 4, 8)}) == pytest.approx(0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=0", "rounds=0 must be ≥ 1"),
        ("router.num_experts=4", "bench scale router.num_experts=4: it sets "),
        ("train.sequence_length=64", "bench scale train.sequence_length=64: it sets "),
        ("parallel.expert_parallel_size=2", "bench scale parallel.expert_parallel_size=2: it sets "),
        ("rate=fast", "rate=fast must be the link's rate as launch/two_namespaces.sh takes it: rate=100mbit"),
        ("rate=100mbit", "bench scale rate= is of a link between ranks: start it with torchrun"),
    ],
)
def test_bad_keys(override: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        run_bench(["scale", override])
