"""Whole rows of every format, equal in all of them; a bad row is one problem, and the next row comes."""

import csv
import json

import datasets
import pyarrow
import pyarrow.parquet as parquet
import pytest

from moe.config import SourceFormat
from moe.data.readers import DataError
from moe.data.sources import _tables
from moe.data.tables import dataset_rows

PAIRS = [{"prompt": f'q {i}, "quoted"\nline', "completion": f"é😀 {i}"} for i in range(600)]


def read_rows(path, form):
    for table in _tables(path, form):
        yield from table.rows()


def values(rows):
    return [row.values for row in rows]


@pytest.mark.parametrize("form", [SourceFormat.jsonl, SourceFormat.csv, SourceFormat.tsv, SourceFormat.parquet])
def test_every_format_gives_the_same_rows(tmp_path, form):
    path = tmp_path / f"rows.{form.value}"
    if form is SourceFormat.jsonl:
        path.write_text("".join(json.dumps(row) + "\n\n" for row in PAIRS))
    elif form is SourceFormat.parquet:
        parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="," if form is SourceFormat.csv else "\t")
            writer.writeheader()
            writer.writerows(PAIRS)
    assert values(read_rows(path, form)) == PAIRS


def test_a_data_set_gives_its_rows(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"{i}"}]} for i in range(5)
    ]
    found = list(dataset_rows(datasets.Dataset.from_list(rows), "here"))
    assert values(found) == rows
    assert found[3].place == "here: row 3"


def test_a_bad_line_of_json_is_a_problem_and_the_next_one_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"a": 1}', b"{", b"[1]", b'{"a": 1, "a": 2}', b'{"a": "\xff"}', b"7", b'{"a": ' + b"[" * 100_000, b"\n",
        b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", b'{"a": ' + b"9" * 10_000 + b"}", b'{"a": 2}',
    ]  # fmt: skip
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    found = list(read_rows(path, SourceFormat.jsonl))
    assert [row.place.rpartition(":")[2] for row in found] == ["1", "2", "3", "4", "5", "6", "7", "10", "11", "12"]
    assert [row.values for row in found if not row.problem][::2] == [{"a": 1}, {"a": 2}]
    problems = [row.problem for row in found if row.problem]
    rules = ["broken JSON at column 2", "must be a JSON object, is a list", "has two fields named 'a'",
             "byte 7 of the line (0xff) is not UTF-8", "must be a JSON object, is a number", "nested too deeply",
             "nested more than 64 levels deep"]  # fmt: skip
    assert len(problems) == len(rules)
    assert all(rule in problem for rule, problem in zip(rules, problems, strict=True)), problems


def test_a_number_of_many_digits_stays_itself(tmp_path):
    path = tmp_path / "a.jsonl"
    numbers = [2**63, -(10**30) + 1, 10**3998 + 7]
    path.write_text("".join(f'{{"a": {number}}}\n' for number in numbers))
    assert values(read_rows(path, SourceFormat.jsonl)) == [{"a": number} for number in numbers]


def test_a_row_of_another_width_is_a_problem_and_a_broken_quote_ends_the_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,2\n3\n4,5,6\n7,8\n"9,10\n')
    rows = read_rows(path, SourceFormat.csv)
    found = [next(rows) for _ in range(4)]
    assert [row.problem for row in found] == [
        "", *[f"has {n} fields, the header 2: quote fields that hold ','" for n in (1, 3)], "",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"a.csv:6: a quote that opens a field in this row is never closed"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("a.jsonl", b'[{"a": 1}]', "begins a JSON array"),
        ("a.csv", b"a,a\n1,2\n", "has 2 fields named 'a': rename all but one"),
        ("a.parquet", b"PAR1", "not readable as Parquet"),
    ],
)
def test_a_file_that_cant_be_read_is_one_line(tmp_path, name, content, rule):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rule):
        list(read_rows(tmp_path / name, SourceFormat[name.rpartition(".")[2]]))
