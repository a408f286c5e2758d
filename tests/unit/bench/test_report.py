"""The report of `moe bench all`: its section is written from the JSON alone, and what isn't a report is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moe.bench import all as bench_all
from moe.bench.report import BEGIN, END, machine, new_report, read_report, section, write_report
from moe.bench.results import Results, ResultTable
from moe.errors import UserError


def _entry(title: str, **other: Any) -> dict[str, Any]:
    results = Results(
        [ResultTable(["side", "tokens/s"], [["ours", 1234.5], ["theirs", None]])],
        ["medians of 3 rounds"],
        {"ratio tokens/s {}": 1.234},
    )
    entry = {"title": title, "about": "a step", "started": "2026-11-29 03:00", "code": "1234567"}
    entry |= {"load": 0.4, "state": "measured"}
    return entry | {"seconds": 60.2, "results": results.values(), "error": []} | other


def _report() -> dict[str, Any]:
    failed = _entry("decode, 1 thread", state="failed", results=None, error=["RuntimeError: no", "exit code 1"])
    return new_report() | {"benchmarks": {"moe bench peers": _entry("peers, 1 thread"), "moe bench decode": failed}}


def test_the_section_holds_machine_results_and_failures() -> None:
    text = "\n".join(section(_report(), "images/page.svg"))
    assert machine()["processor"] in text
    assert f"torch {machine()['versions']['torch']}" in text
    assert "| peers, 1 thread | 2026-11-29 03:00 | 1234567 | measured | 60 s | 0.4 | ratio tokens/s 1.23 |" in text
    assert "| decode, 1 thread | 2026-11-29 03:00 | 1234567 | failed | 60 s | 0.4 | exit code 1 |" in text
    assert "`moe bench peers`: a step.\n\n| side | tokens/s |\n| --- | --- |\n| ours | 1,234 |\n| theirs | – |" in text
    assert "- medians of 3 rounds\n- **ratio tokens/s 1.23**" in text
    assert "\n\n![peers, 1 thread: ratio tokens/s 1.23.](images/page.svg)\n\n| benchmark |" in text
    assert "**failed**\n\n```\nRuntimeError: no\nexit code 1\n```" in text


def test_it_is_written_from_the_json_alone_and_read_back(tmp_path: Path) -> None:
    page, file = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(f"{BEGIN}\n{END}\n")
    report = _report()
    write_report(report, file, page)
    assert read_report(file) == report
    image = tmp_path / "images" / "page.svg"
    once = page.read_text(), image.read_text()
    assert f"]({image.relative_to(tmp_path)})" in once[0]
    write_report(read_report(file), file, page)
    assert (page.read_text(), image.read_text()) == once


def test_the_plot_is_found_from_a_page_whose_name_has_a_space(tmp_path: Path) -> None:
    page = tmp_path / "my page (1).md"
    page.write_text(f"{BEGIN}\n{END}\n")
    write_report(new_report(), tmp_path / "results.json", page)
    assert "](images/my%20page%20%281%29.svg)" in page.read_text()
    assert "No ratio" in (tmp_path / "images" / "my page (1).svg").read_text()


def test_a_place_where_the_plot_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    (tmp_path / "images" / "page.svg").mkdir(parents=True)
    with pytest.raises(UserError, match=r"its plot can't be written to .*page\.svg, a folder: remove it"):
        bench_all.run([f"page={page}", f"json={tmp_path / 'results.json'}"])
    (tmp_path / "images" / "page.svg").rmdir()
    (tmp_path / "images").rmdir()
    (tmp_path / "images").touch()
    with pytest.raises(UserError, match=r"its plot can't be written to .*page\.svg \(File exists\)"):
        bench_all.run([f"page={page}", f"json={tmp_path / 'results.json'}"])


@pytest.mark.parametrize("report", ["performance", "performance-avx2", "performance-avx512"])
def test_the_committed_page_and_plot_are_those_of_the_committed_json(report: str, tmp_path: Path) -> None:
    docs = Path(__file__).parents[3] / "docs"
    page = tmp_path / f"{report}.md"
    page.write_text((docs / page.name).read_text())
    write_report(read_report(docs / f"{report}.json"), tmp_path / f"{report}.json", page)
    for name in (f"{report}.md", f"{report}.json", f"images/{report}.svg"):
        assert (tmp_path / name).read_text() == (docs / name).read_text(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version=2 must be a whole number from 1 to 1"),
        ({"machine": []}, "machine=[] must be an object"),
        ({"benchmarks": {"moe bench peers": {}}}, "not a report of `moe bench all` (KeyError"),
        ({"benchmarks": {"moe bench peers": 3}}, "not a report of `moe bench all` (TypeError"),
        ({"machine": {"versions": 1}}, "not a report of `moe bench all`"),
    ],
)
def test_what_is_no_report_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(_report() | change))
    with pytest.raises(UserError, match=re.escape(message)):
        read_report(file)


@pytest.mark.parametrize("same", [True, False])
def test_results_of_this_machine_stay_when_some_are_measured_again(
    same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, file = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(f"{BEGIN}\n{END}\n")
    report = _report()
    report["machine"]["cores"] += not same
    write_report(report, file, page)
    again = _entry("peers, 1 thread", load=7.0)
    monkeypatch.setattr(bench_all, "_measured", lambda each, more: again | {"title": each.title})
    monkeypatch.setattr(bench_all, "RUNS", (bench_all.BenchRun("peers"),))
    bench_all.run(["only=peers", "rounds=1", f"page={page}", f"json={file}"])
    found = json.loads(file.read_text())["benchmarks"]
    new = "OMP_NUM_THREADS=1 moe bench peers rounds=1"
    assert list(found) == ([new, "moe bench decode"] if same else [new])  # in the order of RUNS
    assert found[new]["load"] == 7.0
