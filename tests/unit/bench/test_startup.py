"""`moe bench startup`: real starts of a small run, and what is no start and no answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe.bench import run_bench, startup
from moe.bench.startup import ANSWERS, FIRST_STEP, Answer, Starts
from moe.errors import UserError
from tests.unit.bench.test_peers import SMALL


def test_a_runs_first_step_and_each_answer_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {number} of a text that is long enough" for number in range(4000)))
    more = ["data=files", f"data.path={text}", "tokenizer.vocab_size=300", "train.peak_tflops=0.1", "engine=plain"]
    results = startup.run(["rounds=1", *SMALL, *more])
    rows = {str(name): [float(number or 0) for number in numbers] for name, *numbers in results.tables[0].rows}
    assert list(rows) == [FIRST_STEP, *(each.name for each in ANSWERS)]
    first, *answers = rows.values()
    assert all(first[0] > seconds > 0 for seconds, *_ in answers)  # torch is imported for the first step alone
    assert all(first[3] > cpu > 0 for *_, cpu in answers)
    assert results.figures["first step after {} s"] == first[0]
    assert ", load " in results.notes[0]
    left = [each.name for each in (tmp_path / "temporary").iterdir()]
    assert [name for name in left if not name.startswith("moe-verified-")] == []  # which moe.data keeps there


def test_figures_are_the_median_of_seconds_and_the_least_cpu_time() -> None:
    starts = {name: Starts([3.0, 1.0, 2.0], [0.9, 0.7, 0.8]) for name in (FIRST_STEP, *(one.name for one in ANSWERS))}
    *_, typo, last = startup.results(starts).lines()
    assert (typo, last) == ("a misspelt key answered in 0.70 s of CPU time", "first step after 2.00 s")


def test_another_answer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bench startup: moe train model\.hiden_size=3 ended with 2:\n.*no such key"):
        startup.answered(Answer("", ("train", "model.hiden_size=3"), 2, "something else"), tmp_path)


def test_a_run_that_ends_before_its_first_step_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"moe train took no first step:\n.*router\.top_k=9"):
        startup.first_step(["router.top_k=9", f"run_dir={tmp_path / 'run'}"], tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=0", "rounds=0 must be ≥ 1"),
        ("run_dir=here", "bench startup run_dir=here: it sets run_dir and data.cache_dir itself"),
        ("model.hiden_size=3", "model.hiden_size=3: no such key"),
    ],
)
def test_bad_keys(override: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        run_bench(["startup", override])
