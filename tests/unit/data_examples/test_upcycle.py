"""The rows of the upcycling example, and its task."""

from __future__ import annotations

from pathlib import Path

import yaml

from data.examples.splits import asked, leaks, read_rows
from data.examples.upcycle import ASKED, ROWS, rows, write


def test_rows_and_task(tmp_path: Path) -> None:
    write(tmp_path)
    train, held_out = (read_rows(tmp_path / f"{name}.jsonl") for name in ("train", "held_out"))
    assert len({asked(row) for row in train + held_out}) == len(train) + len(held_out) == ROWS == len(rows())
    assert not leaks(train, held_out)
    assert 0.05 < len(held_out) / ROWS < 0.15
    for row in train + held_out:
        number = int(row["prompt"].split()[1])
        assert row["completion"] == ("It is even." if number % 2 == 0 else "It is odd.")
    assert (tmp_path / "asked.txt").read_text().splitlines() == [row["prompt"] for row in held_out[:ASKED]]
    task = yaml.safe_load((tmp_path / "tasks/parity.yaml").read_text())
    assert Path(task["dataset_kwargs"]["data_files"]["test"]) == (tmp_path / "held_out.jsonl").resolve()
