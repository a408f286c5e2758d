"""The benchmarks that need ranks run for real at a small shape and end with the line they promise."""

from __future__ import annotations

import contextlib
import io
import re

import pytest
import torch
import torch.distributed as dist

from moe.bench import exchange, link, run_bench, scale_ranks
from moe.distributed import rendezvous
from moe.errors import UserError
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


def test_exchange_ends_with_the_ratio() -> None:
    main, other = run_ranks(2, _bench, ["exchange", *SMALL, "precision=bfloat16"])
    rows = [re.split(r" {2,}", line.strip()) for line in main[1:5]]
    assert [row[0] for row in rows] == [
        "ours, uniform routing", "all_to_all_single, uniform routing",
        "ours, own routing", "all_to_all_single, own routing",
    ]  # fmt: skip
    # 2 sequences × 16 tokens × 2 choices, half of them the other rank's; 32 bfloat16 numbers a row; four exchanges
    assert [float(row[2]) for row in rows[:2]] == pytest.approx([4 * 32 * 32 * 2 / 1e6] * 2, rel=1e-3)
    assert [float(row[4]) for row in rows[:2]] == [0, 0]
    assert all(float(row[4]) > 0 for row in rows[2:])
    assert float(main[-1].removeprefix("own routing: all_to_all_single's time ÷ ours ")) > 0
    assert other == []


def test_exchange_is_not_timed_where_rows_are_lost() -> None:
    with pytest.raises(AssertionError, match="ours, uniform routing: rows or gradients came back changed"):
        run_ranks(2, _lost_rows)


def _lost_rows() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(exchange, "by_expert", lambda rows_MH, _: 0 * rows_MH)
    _bench(["exchange", *SMALL])


def test_exchange_needs_ranks() -> None:
    with pytest.raises(UserError, match=r"^bench exchange needs ranks: torchrun --nproc-per-node 2 -m moe bench …$"):
        run_bench(["exchange"])


def _scaled(*more: str) -> list[str]:
    patch = pytest.MonkeyPatch()
    patch.setattr(scale_ranks, "SEQUENCES", 2)
    patch.setattr(scale_ranks, "LENGTH", 64)
    shape = ["model.vocab_size=320", "model.hidden_size=32", "model.num_hidden_layers=1", "tokenizer.vocab_size=300"]
    return _bench(["scale", "rounds=5", "steps=1", *shape, *more])  # medians: a busy machine delays single calls


def test_scale_measures_each_expert_parallel_size_and_the_exchange_grows_as_planned() -> None:
    main, *others = run_ranks(4, _scaled)
    assert others == [[], [], []]
    titles, *rows = (re.split(r" {2,}", line.strip()) for line in main[:5])
    cells = [dict(zip(titles, row, strict=True)) for row in rows]
    assert [(row["ranks"], row["expert-parallel size"]) for row in cells] == [
        ("1", "1"), ("4", "1"), ("4", "2"), ("4", "4"),
    ]  # fmt: skip
    assert len({row["MFLOP/token"] for row in cells}) == 1
    assert all(float(row["MaxVio"]) > 0 for row in cells)
    two, four = (float(row["exchange, MB a step"]) for row in cells[2:])
    assert four / two == pytest.approx((3 / 4) / (1 / 2), rel=0.05)
    assert all(float(row["counted ÷ planned"]) == pytest.approx(1, abs=0.05) for row in cells[2:])
    assert main[-1].startswith("exchanged bytes, counted ÷ planned ")


def test_scale_with_a_links_rate_fits_its_law_and_says_how_far_it_is_off() -> None:
    main, other = run_ranks(2, _scaled, "rate=8gbit")
    assert other == []
    titles, *rows = (re.split(r" {2,}", line.strip()) for line in main[:4])
    steps = [dict(zip(titles, row, strict=True)) for row in rows]
    assert [row["law ÷ measured"] == "–" for row in steps] == [True, False, False]
    both = sum(float(steps[2][name]) for name in ("exchange, MB a step", "gradients and weights, MB a step"))
    assert float(steps[2]["ms at the stated rate"]) == pytest.approx(both / 1e9 * 1e3 * 1e6, rel=0.02)
    titles, *rows = (re.split(r" {2,}", line.strip()) for line in main[4 : 5 + 2 * len(link.SIZES)])
    calls = [dict(zip(titles, row, strict=True)) for row in rows]
    expected = [(name, f"{size:,}") for name in link.COLLECTIVES for size in link.SIZES]
    assert [(row["one call"], row["bytes a rank to others"]) for row in calls] == expected
    assert all(float(row["ms"].replace(",", "")) > 0 for row in calls)
    assert sum(line.endswith("the link's stated rate is 1000 MB/s") for line in main) == 2
    assert main[-1].startswith("time beyond one rank's alone at expert-parallel size 2, law ÷ measured ")


def _counted() -> float:
    mesh = rendezvous.start(1)
    group = dist.new_group()
    rows = torch.zeros(4, 8)  # 1 row stays, or is sent, of each rank
    with scale_ranks._counted_exchange() as sent:
        out_of = [1, 3] if mesh.rank else [3, 1]
        dist.all_to_all_single(torch.zeros(4, 8), rows, out_of, out_of, group=group)
        dist.all_to_all_single(torch.zeros(4, 8), rows, group=group)
    rendezvous.stop()
    return sent[0]


def test_what_a_rank_sends_to_itself_is_not_counted() -> None:
    assert run_ranks(2, _counted) == [4 * 8 * (1 + 2)] * 2
