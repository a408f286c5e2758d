"""`moe bench kernels` on tiny sizes: all kernels and sides, results that agree first, and what a row says."""

from __future__ import annotations

import pytest
import torch

from moe.bench import kernels, run_bench
from moe.bench.gpu.measure import kept_bytes
from moe.bench.kernel_case import Case, Side
from moe.bench.results import Cell
from moe.errors import UserError
from tests.unit.bench.test_peers import SMALL

LIMITS = kernels.Limits(flops=1e9, bytes=1e9)


@pytest.fixture
def _small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "copy_rate", lambda device, attempts: 1e9)
    monkeypatch.setattr(kernels, "measure_peak_flops", lambda device, dtype, clock: 1e10)


@pytest.mark.usefixtures("_small_copies")
@pytest.mark.parametrize("more", [[], ["precision=bfloat16", "model.sliding_window=8"]], ids=str)
def test_every_kernel_is_measured_beside_its_references(more: list[str]) -> None:
    pytest.importorskip("transformers")
    results = kernels.run(["rounds=1", *SMALL, *more])
    sides: dict[str, list[str]] = {}
    for name, side, *_ in results.tables[0].rows:
        sides.setdefault(str(name), []).append(str(side))
    assert list(sides) == [
        "norm", "projections and rotation", "attention's scores", "attention, whole", "router",
        *(f"{part}, {routing} routing" for routing in ("own", "uniform")
          for part in ("sort", "gather", "experts", "combine", "sort to combine")),
        "sparse layer, own routing", "sparse layer, uniform routing",
        "head and loss", next(name for name in sides if name.startswith("AdamW, ")),
    ]  # fmt: skip
    assert sides["sort to combine, own routing"] == [
        "ours", "PyTorch", "transformers, eager", "transformers, grouped_mm",
    ]  # fmt: skip
    blocks = [] if more else ["transformers, eager", "transformers, grouped_mm"]
    assert sides["sparse layer, uniform routing"] == ["ours", *blocks, "DeepSpeed's MoE"]
    assert sides["head and loss"] == sides["norm"] == ["ours", "PyTorch", "transformers"]
    violations = {str(row[0]): row[-1] for row in results.tables[0].rows}
    assert violations["experts, uniform routing"] == 0
    assert float(violations["experts, own routing"] or 0) > 0
    assert list(results.figures) == ["median of the references' time ÷ ours {}"]


def _side(factor: float) -> Side:
    x = torch.randn(4, 8, requires_grad=True, generator=torch.Generator().manual_seed(0))
    return Side(lambda: [(factor * x).square()], [x])


def test_sides_that_differ_are_not_timed() -> None:
    with pytest.raises(RuntimeError, match=r"square: ours differs from wrong by \d\.\de-02, more than 1e-04"):
        kernels.measure(Case("square", {"ours": _side(1.0), "wrong": _side(1.01)}), 1, LIMITS, 1e-4)


def test_a_row_holds_the_traffic_and_what_is_kept() -> None:
    (row,) = kernels.measure(Case("square", {"ours": _side(2.0)}, flops=64.0), 1, LIMITS, 1e-4)
    cells = dict(zip(kernels.COLUMNS, row, strict=True))
    size = 4 * 4 * 8  # bytes of x, and of its square
    assert kept_bytes((side := _side(2.0)).forward, side.leaves) == size  # 2·x; x itself is a leaf
    assert cells["kept, MB"] == size / 1e6
    seconds = (3 + 2) * size / (float(cells["GB/s"] or 0) * 1e9)
    assert cells["GFLOP/s"] == pytest.approx(64 / seconds / 1e9)
    assert cells["% of limit"] == pytest.approx(100 * 5 * size / LIMITS.bytes / seconds)
    assert cells["× ours"] == cells["most ÷ least"] == 1
    assert float(cells["peak, MB"] or 0) >= 3 * size / 1e6  # 2·x, its square and the gradient of x


def test_the_peak_holds_what_lives_for_a_moment() -> None:
    x = torch.randn(1024, 256, requires_grad=True)
    size, gradients = x.numel() * 4, [torch.ones_like(x)]
    lean = Side(lambda: [2 * x], [x])  # its output, and the gradient of x
    waste = Side(lambda: [2 * x + torch.ones(3, 1024, 256).sum()], [x])  # three times as much for a moment, and 2·x
    found = kernels.peaks({"lean": lean, "waste": waste, "lean again": lean}, gradients)
    assert found["lean"] == found["lean again"] == pytest.approx(2 * size, abs=1024)
    assert found["waste"] == pytest.approx(4 * size, abs=1024)


def test_sides_whose_rounds_disagree_are_counted() -> None:
    rows: list[list[Cell]] = [[*[None] * kernels.ROUNDS, ratio] for ratio in (1.0, 1.6, 2.0)]
    assert kernels.steadiness(rows) == "the rounds of 2 of 3 sides disagree: the machine is busy"
    assert kernels.steadiness(rows[:1]) == "the rounds of 0 of 1 side disagree"


@pytest.mark.parametrize(
    ("override", "message"), [("rounds=0", "rounds=0 must be ≥ 1"), ("steps=3", "steps=3: no such key")]
)
def test_bad_keys(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_bench(["kernels", override])
