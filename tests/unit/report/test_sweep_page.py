"""The page about a sweep, of made trials: whole, small, escaped, without a network; whatever is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moe.report.sweep_page import is_sweep, write_sweep_report
from tests.unit.report.made_sweep import write_sweep


def test_the_page_has_every_section_and_needs_no_network(tmp_path: Path) -> None:
    assert is_sweep(write_sweep(tmp_path))
    page = write_sweep_report(tmp_path)
    assert page == tmp_path / "report.html"
    assert page.stat().st_size < 6e6
    text = re.sub(r"<script>.*?</script>", "", page.read_text(), flags=re.DOTALL)
    for heading in (
        "The best point again",
        "Parallel coordinates",
        "Importance",
        "Seed noise",
        "Balance over the steps",
    ):
        assert f">{heading}</h2>" in text
    assert "moe train model=tiny router.aux_loss_coef=" in text
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    assert "router.scoring&lt;" in text
    assert "scoring<" not in text
    assert "&lt;out of memory&gt;" in text


def test_each_chart_is_one_figure_of_numbers(tmp_path: Path) -> None:
    text = write_sweep_report(write_sweep(tmp_path, points=4)).read_text()
    figures = [json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', text)]
    assert len(figures) == 1 + 1 + 2 + 1 + 4  # front, parallel coordinates, effects, importance, balance
    assert all(figure["data"] and figure["layout"] for figure in figures)
    front = figures[0]["data"]
    assert len(front[0]["x"]) + len(front[1]["x"]) == 4


def test_one_seed_says_that_noise_is_unknown(tmp_path: Path) -> None:
    text = write_sweep_report(write_sweep(tmp_path, seeds=1)).read_text()
    assert "what noise between seeds is can&#x27;t be said" in text


def test_a_sweep_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    data = json.loads((write_sweep(tmp_path) / "trials.json").read_text())
    (tmp_path / "trials.json").write_text(json.dumps(data | {"trials": [], "importance": {}}))
    assert "No trial is complete yet." in write_sweep_report(tmp_path).read_text()


def test_run_directories_that_are_gone_leave_the_rest(tmp_path: Path) -> None:
    for path in write_sweep(tmp_path).glob("trials/*/metrics.jsonl"):
        path.unlink()
    assert "No max_violation in the trials&#x27; metrics.jsonl." in write_sweep_report(tmp_path).read_text()


@pytest.mark.parametrize("content", ["", "[]", '{"trials": [{}]}', "\0", '{"trials": 3}'])
def test_what_is_no_sweep_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "trials.json").write_text(content)
    with pytest.raises(ValueError, match=r"trials\.json: not (what `moe sweep` writes|valid JSON)"):
        write_sweep_report(tmp_path)
