"""The plot of benchmarks' results: every ratio and side is in it, nothing overlaps or leaves it, any text is safe."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from moe.bench.plot import EMPTY, LESS_IS_BETTER, embedded, is_ratio, plot, spread_out, summary
from moe.bench.results import Results, ResultTable
from moe.bench.svg import LINE, WIDTH, width

ROOT = Path(__file__).parents[3]
HOSTILE = "<script>alert('1')</script> ](http://x) `a` & \x00\x1b[0m"
LONG = "peers, " + ", ".join(f"train.some_key_{index}={index}" for index in range(40))


def _values(figures: dict[str, float], curves: dict[str, list[float | None]] | None = None) -> dict[str, Any]:
    tables = [ResultTable(["side", "tokens/s"], [["ours", 1.0]])]
    if curves:
        rows = [[10.0 * (index + 1), *losses] for index, losses in enumerate(zip(*curves.values(), strict=True))]
        tables.append(ResultTable(["seconds", *curves], [list(row) for row in rows], "nats against seconds"))
    return json.loads(json.dumps(Results(tables, [], figures).values()))


RATIOS = {"ratio tokens/s {}": 1.234, "GFLOP/s {}": 99.0, "2 processes ÷ 1: {}": 0.5}
CURVES: dict[str, list[float | None]] = {"sparse": [None, 4.0, 3.5], "dense": [5.0, 4.1, 3.51], "GPT": [None] * 3}
CASES: dict[str, dict[str, Any]] = {
    "empty": {},
    "failed": {"decode": None, "peers": _values(RATIOS)},
    "without a ratio": {"roofline": _values({"GFLOP/s {}": 99.0})},
    "long": {LONG: _values({f"ratio {LONG} {{}}": 3.0}, {LONG: [3.0, 2.0], "x" * 500: [3.0, 2.0]})},
    "hostile": {HOSTILE: _values({f"ratio {HOSTILE} {{}}": 3.0}, {HOSTILE: [3.0]})},
    "curves": {"time_to_loss": _values({}, CURVES)},
    "constant": {"time_to_loss": _values({}, {"one": [2.0]})},
    "many sides": {"time_to_loss": _values({}, {f"side {index}": [3.0 + index / 1e3] for index in range(30)})},
    "extreme": {"a": _values({"ratio a {}": 0.0, "ratio b {}": -1.0, "ratio c {}": 1e-9, "ratio d {}": 12345.6})},
    "less": {"memory": _values({LESS_IS_BETTER[0]: 0.4})},
}


def _texts(svg: str) -> list[tuple[float, float, float, str]]:
    """(left, right, middle, text) of each text, by its estimated width."""
    found = []
    for one in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        text = "".join(one.itertext())
        share = {"middle": 0.5, "end": 1.0}.get(one.get("class", ""), 0.0)
        left = float(one.get("x", "nan")) - share * width(text)
        found.append((left, left + width(text), float(one.get("y", "nan")), text))
    return found


@pytest.mark.parametrize("case", CASES)
def test_no_text_overlaps_another_or_leaves_the_picture(case: str) -> None:
    svg = plot(CASES[case], "a processor, 2 cores")
    texts, high = _texts(svg), float(ElementTree.fromstring(svg).get("height", "nan"))
    for left, right, middle, _ in texts:
        assert left >= 0
        assert right <= WIDTH
        assert 0 < middle < high
    for one, other in itertools.combinations(texts, 2):
        apart = one[1] <= other[0] or other[1] <= one[0] or abs(one[2] - other[2]) >= LINE - 1
        assert apart, (one, other)


@pytest.mark.parametrize("case", CASES)
def test_text_is_data_and_never_an_element(case: str) -> None:
    svg = plot(CASES[case])
    kinds = {one.tag.rpartition("}")[2] for one in ElementTree.fromstring(svg).iter()}
    assert kinds <= {"svg", "title", "desc", "style", "rect", "path", "circle", "text"}
    assert "nan" not in svg
    assert "inf" not in svg.partition("</desc>")[2]


def test_each_ratio_has_a_bar_and_its_value() -> None:
    svg = plot({"decode": None, "peers": _values(RATIOS)})
    texts = [text for _, _, _, text in _texts(svg)]
    assert {"peers", "ratio tokens/s", "1.23", "2 processes ÷ 1", "0.50"} <= set(texts)
    assert not any("GFLOP" in text for text in texts)
    bars = [one for one in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect")][-2:]
    more, less = ((float(one.get("x", "nan")), float(one.get("width", "nan"))) for one in bars)
    assert more[0] == pytest.approx(less[0] + less[1], abs=0.2)  # one begins at 1 where the other ends
    assert less[1] / more[1] == pytest.approx(3.297, rel=0.01)  # log 0.5 ÷ log 1.234


def test_each_side_has_a_line_with_its_last_loss_and_gaps_are_left_out() -> None:
    svg = plot(CASES["curves"])
    texts = [text for _, _, _, text in _texts(svg)]
    assert {"sparse 3.50", "dense 3.51", "time_to_loss: nats against seconds"} <= set(texts)
    assert not any("GPT" in text for text in texts)  # it has no value
    assert svg.count("<circle") == 5


def test_the_alternative_text_states_what_is_drawn() -> None:
    titled = {"peers": _values(RATIOS), "decode": None, "time_to_loss": _values({}, CURVES)}
    said = (
        "peers: ratio tokens/s 1.23; 2 processes ÷ 1: 0.50. "
        "time_to_loss: sparse: 3.50 nats after 30 s; dense: 3.51 nats after 30 s."
    )
    assert summary(titled) == said
    assert embedded(titled, "images/page.svg") == f"![{said}](images/page.svg)"
    assert summary({}) == EMPTY
    description = ElementTree.fromstring(plot(titled)).findtext("{http://www.w3.org/2000/svg}desc")
    assert description == said


def test_markdown_in_a_title_stays_text() -> None:
    line = embedded(CASES["hostile"], "images/page.svg")
    assert "\\<script\\>alert('1')\\</script\\> \\](http://x) \\`a\\` \\&" in line
    assert "\n" not in line
    assert line.endswith(".](images/page.svg)")


def test_labels_keep_their_order_and_their_places_where_there_is_room() -> None:
    assert spread_out([50, 10], [20, 20], 0, 100) == [50, 10]
    assert spread_out([50, 50, 51], [20, 20, 20], 0, 100) == [50, 70, 90]
    assert spread_out([99, 98, 97], [20, 20, 20], 0, 100) == [90, 70, 50]
    assert spread_out([0, 0], [50, 50], 0, 100) == [25, 75]


def test_the_ratios_of_which_less_is_better_are_those_of_benchmarks() -> None:
    code = "".join(path.read_text() for path in (ROOT / "moe/bench").glob("*.py") if path.name != "plot.py")
    assert all(is_ratio(line) and f'"{line}"' in code for line in LESS_IS_BETTER)
