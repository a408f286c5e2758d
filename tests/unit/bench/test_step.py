"""`moe bench step` on a tiny shape: its keys, its tables and its last lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe.bench import run_bench, step
from moe.errors import UserError
from tests.unit.bench.test_peers import SMALL


def test_every_part_has_its_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {number} of a text that is long enough" for number in range(4000)))
    data = [f"data.path={text}", f"data.cache_dir={tmp_path / 'cache'}", "engine=plain"]
    results = step.run(["rounds=2", *SMALL, *data])
    parts, operations = results.tables
    rows = {str(row[0]): row for row in parts.rows}
    assert {"attention", "router", "dispatch", "experts", "norms", "loss", "optimizer", "data wait"} <= rows.keys()
    assert "exchange" not in rows
    assert sum(float(row[3] or 0) for row in rows.values()) == pytest.approx(100)
    assert float(rows["experts"][2] or 0) > 0
    assert rows["data wait"][2] == rows["optimizer"][2] == 0
    assert [name for name, row in rows.items() if row[4] is not None] == ["attention", "router", "experts", "loss"]
    assert len(operations.rows) == step.LARGEST
    times = [float(row[3] or 0) for row in operations.rows]
    assert times == sorted(times, reverse=True)
    assert list(results.figures) == ["data wait {} % of a step", "MFU {} %"]
    assert all(value > 0 for value in results.figures.values())


@pytest.mark.parametrize(
    ("override", "message"), [("rounds=0", "rounds=0 must be ≥ 1"), ("steps=3", "steps=3: no such key")]
)
def test_bad_keys(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_bench(["step", override])
