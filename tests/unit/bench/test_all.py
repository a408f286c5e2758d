"""`moe bench all`: real benchmarks on tiny shapes, one that fails among them; its keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe.bench import BENCHMARKS, run_bench
from moe.bench import all as bench_all
from moe.bench.all import BenchRun
from moe.bench.report import BEGIN, END
from moe.errors import UserError
from tests.unit.bench.test_peers import SMALL

RUNS = (
    BenchRun("peers", ("model=mistral_7b",)),
    BenchRun("diagnostics", (*SMALL, "tokenizer.vocab_size=300")),
    BenchRun("decode", threads=4096),
)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "page.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return [f"page={tmp_path / 'page.md'}", f"json={tmp_path / 'results.json'}"]


def test_a_benchmark_that_fails_is_named_and_the_others_run(
    tmp_path: Path, files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_all, "RUNS", RUNS)
    with pytest.raises(SystemExit) as exited:
        run_bench(["all", "rounds=1", "steps=1", *files])
    assert exited.value.code == 1
    assert capsys.readouterr().err == "failed: peers, model=mistral_7b, 1 thread\n"
    values = json.loads((tmp_path / "results.json").read_text())["benchmarks"]
    assert [each["state"] for each in values.values()] == ["failed", "measured", "left out"]
    failed, measured, left_out = values.values()
    assert "model.mlp=dense must be sparse" in failed["error"][-2]
    assert failed["error"][-1] == "exit code 2"
    assert list(measured["results"]["figures"]) == ["diagnostics cost {} % of a step"]
    assert left_out["error"][0].startswith("needs 4096 cores, and ")
    text = (tmp_path / "page.md").read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "model.mlp=dense must be sparse" in text
    assert "| diagnostics, " in text
    assert "old\n" not in text
    assert "](images/page.svg)" in text
    assert (tmp_path / "images" / "page.svg").read_text().startswith("<svg ")


@pytest.mark.parametrize("each", bench_all.RUNS, ids=lambda each: each.title)
def test_every_run_is_of_a_benchmark_and_has_the_keys_that_it_takes(each: BenchRun) -> None:
    assert each.name in BENCHMARKS
    assert set(each.takes) <= {"rounds", "steps"}


def test_stated_rounds_take_the_place_of_a_runs_own() -> None:
    each = BenchRun("saving", ("rounds=3", "model=tiny"), ranks=2)
    assert each.title == "saving, model=tiny, 2 ranks of 1 thread"
    assert each.command([])[5:] == ["bench", "saving", "rounds=3", "model=tiny"]
    assert each.command(["rounds=1"])[5:] == ["bench", "saving", "model=tiny", "rounds=1"]


def test_every_benchmark_of_the_cpu_is_run() -> None:
    assert {each.name for each in bench_all.RUNS} == BENCHMARKS.keys() - {"all", "gpu"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["only=peers,speed"], "only=peers,speed: speed is none of roofline, peers"),
        (["only="], "bench all only=: its keys are only, page, json, rounds, steps"),
        (["model=tiny"], "bench all model=tiny: its keys are"),
        (["rounds=0"], "rounds=0 must be ≥ 1"),
        (["json=no/such/file"], "json=no/such/file must be a file in a folder that exists"),
        (["page=no/such/page.md"], "no/such/page.md can't be read"),
        (["page=LICENSE"], "LICENSE must have the lines <!-- cpu report: begin -->"),
    ],
)
def test_bad_keys_are_one_line(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    stated = [] if any(one.startswith("json=") for one in overrides) else [f"json={tmp_path / 'results.json'}"]
    with pytest.raises(UserError) as caught:
        run_bench(["all", *overrides, *stated])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
