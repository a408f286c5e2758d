"""The page and the other files of an analysis: complete, self-contained, and of any sparse model."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from moe.analysis.files import write_files
from moe.analysis.page import render
from moe.analysis.result import Analysis
from moe.analysis.run import measure
from moe.config import AnalyzeConfig, AnalyzeSettings
from tests.unit.analysis.made import corpus, model, uneven_model


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    folder = tmp_path_factory.mktemp("analysis")
    config = AnalyzeConfig(checkpoint="run", analyze=AnalyzeSettings(sequences=8, permutations=5, text_tokens=20))
    checkpoint = folder / "a <run> & more" / "checkpoints" / "step_00000007"
    return measure(config, checkpoint, 7, uneven_model(), corpus(folder), 32)


@pytest.fixture(scope="module")
def folder(analysis: Analysis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(analysis, tmp_path_factory.mktemp("files") / "analysis").parent


def test_json_has_every_layer_and_no_nan(folder: Path) -> None:
    text = (folder / "analysis.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} isn't JSON"))
    assert found["layers"] == [
        {"layer": 1, "num_experts": 4},
        {"layer": 2, "num_experts": 6},
        {"layer": 3, "num_experts": 2},
    ]
    assert [source["name"] for source in found["sources"]] == ["sums", "words"]
    for name in ("assignment", "repetition", "information", "favourites", "contexts", "similarity"):
        assert {row["layer"] for row in found[name]} == {1, 2, 3}, name
    assert {(row["layer"], row["expert"]) for row in found["leave_out"]["experts"]} == {
        (layer["layer"], expert) for layer in found["layers"] for expert in range(layer["num_experts"])
    }


def test_csv_files(folder: Path) -> None:
    tables = {path.stem: list(csv.DictReader(path.open(encoding="utf-8"))) for path in folder.glob("*.csv")}
    assert tables.keys() == {
        "assignment", "repetition", "information", "favourites", "contexts", "similarity", "leave_out",
    }  # fmt: skip
    assert len(tables["assignment"]) == (4 + 6 + 2) * 2 * 2
    assert len(tables["similarity"]) == 6 + 15 + 1
    assert {row["source"] for row in tables["leave_out"]} == {"all", "sums", "words"}
    whole = [float(row["share"]) for row in tables["assignment"] if row["layer"] == "2" and row["which"] == "all"]
    assert sum(whole) == pytest.approx(2), "of each source"


def test_the_page_is_self_contained_and_small(folder: Path) -> None:
    page = (folder / "analysis.html").read_bytes()
    assert len(page) < 6e6
    text = page.decode()
    plain = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", plain)
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert len(scripts) == 2, "plotly's, once, and the page's own"
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert digest in policy[1], "the policy lets exactly these run"


def test_text_of_the_corpus_and_the_runs_name_are_escaped(folder: Path) -> None:
    text = (folder / "analysis.html").read_text(encoding="utf-8")
    plain = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert "a &lt;run&gt; &amp; more" in plain
    assert "<run>" not in plain
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', plain, flags=re.DOTALL)
    assert embedded
    assert "<" not in embedded[1]
    data = json.loads(embedded[1])
    assert [one["source"] for one in data["texts"]] == ["sums", "words"]
    for one in data["texts"]:
        assert {len(experts) for place in one["experts"] for experts in place.values()} == {len(one["tokens"])} == {20}
    assert data["by_layer"].keys() >= {"assignment-all", "assignment-first", "similarity-weights", "worth-of-layer"}
    drawn = set(re.findall(r'data-figure="([^"]+)"', plain))
    assert drawn == data["figures"].keys() | data["by_layer"].keys(), "every figure has its place and every place one"


def test_a_model_alone_has_the_name_of_its_own_folder(analysis: Analysis, tmp_path: Path) -> None:
    alone = replace(analysis, checkpoint=tmp_path / "above" / "imported")
    assert alone.run == tmp_path / "above" / "imported"
    page = render(alone)
    assert "<h1>imported</h1>" in page
    assert analysis.run.name == "a <run> & more"


def test_without_a_budget_the_worth_is_left_out_with_the_reason(tmp_path: Path) -> None:
    config = AnalyzeConfig(checkpoint="run", analyze=AnalyzeSettings(sequences=4, permutations=2, leave_out_tokens=0))
    found = measure(config, tmp_path / "checkpoints" / "step_00000001", 1, uneven_model(), corpus(tmp_path), 32)
    written = write_files(found, tmp_path / "out").parent
    assert json.loads((written / "analysis.json").read_text())["leave_out"] is None
    assert not (written / "leave_out.csv").exists()
    page = (written / "analysis.html").read_text(encoding="utf-8")
    assert (
        "Not measured: analyze.leave_out_tokens=0 is less than two sequences for each of 12 experts take, 768." in page
    )


def test_the_page_of_many_experts_stays_small(tmp_path: Path) -> None:
    config = AnalyzeConfig(checkpoint="run", analyze=AnalyzeSettings(sequences=12, permutations=1, leave_out_tokens=0))
    made = model(layers=12, experts=64, top_k=8)
    found = measure(config, tmp_path / "checkpoints" / "step_00000001", 1, made, corpus(tmp_path), 128)
    page = write_files(found, tmp_path / "out")
    assert page.stat().st_size < 6e6
    assert "6 of them here one by one, all in the files" in page.read_text(encoding="utf-8")
