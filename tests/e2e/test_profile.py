"""`moe train profile=true`: a trace and a table by part."""

import csv
import json
from pathlib import Path

from tests.e2e.conftest import SMALL, Run, read_metrics


def test_two_ranks_that_share_experts_write_traces_and_a_table(moe: Run, corpus: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    more = ["profile=true", "train.steps=9", "parallel.expert_parallel_size=2"]
    done = moe("train", f"run_dir={run_dir}", *corpus, *SMALL, *more, ranks=2)
    assert done.returncode == 0, done.stderr
    folder = run_dir / "profile"
    assert {path.name for path in folder.iterdir()} == {"trace_rank0.json", "trace_rank1.json", "parts.csv"}
    for rank in range(2):
        events = json.loads((folder / f"trace_rank{rank}.json").read_text(encoding="utf-8"))["traceEvents"]
        assert sum(event.get("name") == "moe: data wait" for event in events) == 4
    with (folder / "parts.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    spent = {(row["rank"], row["part"]): float(row["host_ms_per_step"]) for row in rows}
    parts = ("attention", "router", "dispatch", "exchange", "experts", "norms", "loss", "gradients", "optimizer")
    assert all(spent[rank, part] > 0 for rank in "01" for part in (*parts, "data wait", "other"))
    assert any(line.startswith("exchange ") and line.endswith("experts' ranks") for line in done.stdout.splitlines())
    assert f"profile: {folder}" in done.stdout
    assert all(0 <= float(str(line["data_wait"])) < 1 for line in read_metrics(run_dir))


def test_a_resume_with_few_steps_left_goes_on_unprofiled(moe: Run, corpus: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    begun = moe("train", f"run_dir={run_dir}", *corpus, *SMALL, "engine=plain", "train.steps=5")
    assert begun.returncode == 0, begun.stderr
    more = ["checkpoint.allow_changes=true"]  # of train.steps
    done = moe("train", f"run_dir={run_dir}", *corpus, *SMALL, "engine=plain", "train.steps=9", "profile=true", *more)
    assert done.returncode == 0, done.stderr
    assert "profile=true: not profiled, 4 steps are left, and the first 8 would be needed" in done.stdout
    assert not (run_dir / "profile").exists()
