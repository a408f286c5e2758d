"""answers.json on the page: escaped, and refused in one line where it isn't what a run writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe.errors import UserError
from moe.report.answers import answers_table, read_answers

ROW = {"prompt": "<b>1 + 1", "expected": "2", "answer": "<script>"}


def test_answers_beside_what_was_expected(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    assert read_answers(path) is None
    path.write_text(json.dumps({"step": 7, "rows": [ROW, ROW | {"answer": "2"}]}))
    found = read_answers(path)
    assert found is not None
    page = answers_table(found)
    assert "at step 7" in page
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert page.count("expected: 2") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"step": -1, "rows": []}, "step=-1 must be a whole number"),
        ({"step": 1, "rows": 3}, "rows=3 must be a list of rows"),
        ({"step": 1, "rows": [ROW] * 101}, "must be a list of rows"),
        ({"step": 1, "rows": [7]}, "row 0: must be a JSON object"),
        ({"step": 1, "rows": [ROW | {"answer": None}]}, "row 0: answer=null must be text"),
    ],
)
def test_a_foreign_file(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / "answers.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="remove it; the next evaluation") as raised:
        read_answers(tmp_path / "answers.json")
    assert message in str(raised.value)
