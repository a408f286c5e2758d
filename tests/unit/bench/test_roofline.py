"""`moe bench roofline` on tiny sizes: its keys, its table and its last lines."""

from __future__ import annotations

import pytest

from moe.bench import roofline, run_bench
from moe.errors import UserError
from tests.unit.bench.test_peers import SMALL


def test_every_route_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(roofline, "SQUARE", 64)
    monkeypatch.setattr(roofline, "COPIED", 1 << 16)
    run_bench(["roofline", "rounds=1", *SMALL])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "product, GFLOP/s"
    assert all(route.name in lines[0] for route in roofline.ROUTES)
    squares = next(line for line in lines if line.startswith("large square")).split()[2:]
    assert squares[:3] == ["64", "64", "64"]
    assert all(float(rate.replace(",", "")) > 0 for rate in squares[3:])
    for line, name in zip(lines[-2:], ("bfloat16", "float32"), strict=True):
        assert line.startswith(f"{name} GFLOP/s ")
        assert float(line.split()[-1]) > 0


def test_the_products_are_those_of_a_step() -> None:
    _, config = roofline.parse([])
    assert roofline.shapes_of(config) == {
        "queries, keys, values": (2048, 256, 384),
        "attention's output": (2048, 256, 256),
        "an expert's gate and up": (512, 256, 1792),
        "an expert's down": (512, 896, 256),
        "head, a slice of tokens": (512, 256, 4096),
        "large square": (2048, 2048, 2048),
    }
    _, dense = roofline.parse(["model.mlp=dense"])
    assert roofline.shapes_of(dense)["down"] == (2048, 896, 256)


def test_errors_are_those_of_the_dtypes() -> None:
    plain, _, narrow, widened = (roofline.error(route, (32, 256, 32)) for route in roofline.ROUTES)
    assert 0 < plain < 1e-5 < 1e-4 < narrow < 1e-1
    assert widened == pytest.approx(narrow, rel=0.1)


@pytest.mark.parametrize(
    ("override", "message"),
    [("rounds=0", "rounds=0 must be ≥ 1"), ("steps=3", "steps=3: no such key"), ("rounds=x", "must be a whole number")],
)
def test_bad_keys(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_bench(["roofline", override])
