"""Rows: CSV and TSV are read exactly; hostile and damaged rows of each format are one line with file and row."""

import bz2
import csv
import gzip
import json
import lzma
import random

import pyarrow
import pyarrow.parquet as parquet
import pytest

from moe.data.file_parts import JsonDocuments, line_parts, parquet_parts
from moe.data.readers import DataError
from moe.data.rows import read_csv


def read_jsonl(path, key, field):
    for lines in line_parts(path):
        yield from JsonDocuments(lines, key, field).chunks()


def read_parquet(path, key, field):
    for part in parquet_parts(path, key, field):
        yield from part.chunks()


def texts(chunks):
    return [chunk.text for chunk in chunks]


def error_of(chunks):
    with pytest.raises(DataError) as caught:
        list(chunks)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    return message


def table(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_csv(path, "data", "text", "\t" if path.suffix == ".tsv" else ",")


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_is_read_as_the_csv_module_writes_it(tmp_path, suffix, end):
    dice = random.Random(0)
    pieces = ["a", '"', ",", "\t", "\n", "\r\n", "é", "😀", " ", "word", "'", "\\", ";"]
    rows = ["".join(dice.choices(pieces, k=dice.randrange(1, 20))) for _ in range(300)]
    path = tmp_path / f"rows{suffix}"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",", lineterminator=end)
        writer.writerows([["id", "text", "more, of it"], *([index, row, "x"] for index, row in enumerate(rows))])
    assert texts(read_csv(path, "data", "text", "\t" if suffix == ".tsv" else ",")) == rows
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert texts(read_csv(path, "data", "text", "\t" if suffix == ".tsv" else ",")) == rows


def test_a_field_longer_than_the_csv_modules_limit(tmp_path):
    long = "word and line\n" * 50_000
    assert texts(table(tmp_path / "a.csv", f'id,text\n1,"{long}"\n2,short\n')) == [long, "short"]


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("id,body\n1,a\n", ":1: no field 'text'; it has id, body: set data.text_field"),
        (
            "id;text\n1;a\n",
            ":1: no field 'text'; it has id;text: set data.text_field, or separate columns by ',' instead",
        ),
        ("text,text\na,b\n", ":1: has 2 fields named 'text': rename all but one"),
        ("id,text\n1,a\n2,b,c\n", ":3: has 3 fields, the header 2: quote fields that hold ','"),
        ("id,text\n1\n", ":2: has 1 fields, the header 2"),
        ('id,text\n1,"two\nlines"\n2,"open\nand on\n', ":4: a quote that opens a field in this row is never closed"),
        ('id,text\n1,"a"b\n', ":2: broken quotes: "),
        ("id,text\r1,a\r", ":1: a carriage return outside quotes"),
        (b"id,text\n1,\xe9\n", ": byte 10 (0xe9) is not UTF-8"),
        (b"id,text\n1,a\0b\n", ": byte 11 is NUL"),
        ("id,text\n1,a\n".encode("utf-16"), " is NUL: the file is UTF-16"),
    ],
)
def test_bad_csv_names_the_row(tmp_path, content, rule):
    path = tmp_path / "a.csv"
    message = error_of(table(path, content))
    assert message.startswith(str(path))
    assert rule in message


def test_a_csv_with_a_header_alone_or_nothing_has_no_documents(tmp_path):
    assert texts(table(tmp_path / "a.csv", "id,text\n\n")) == []
    assert texts(table(tmp_path / "b.csv", "")) == []


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"\\ud800": 1, "b\\u001b[2J": 2}', r"no field 'text'; it has \ud800, b\x1b[2J: set data.text_field"),
        (json.dumps({"k" * 5000: 1} | {f"k{i}": 1 for i in range(500)}), "(5000 characters), k0"),
        ('{"text": "a", "text": "b"}', "has 2 fields named 'text': rename all but one"),
        ('{"text": ' + "9" * 6000 + "}", "field 'text' must be a string, is a number"),
        ('{"a": ' * 50_000, "broken JSON: nested too deeply"),
    ],
)
def test_hostile_json_is_one_line(tmp_path, line, rule):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    message = error_of(read_jsonl(path, "data", "text"))
    assert message.startswith(f"{path}:2: ")
    assert rule in message


def test_a_number_of_any_length_beside_the_text_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": ' + "9" * 6000 + ', "text": "a", "meta": {"text": 1}}\n')
    assert texts(read_jsonl(path, "data", "text")) == ["a"]


@pytest.mark.parametrize("content", ['[{"text": "a"}, {"text": "b"}]', '[\n {"text": "a"}\n]\n', "\ufeff\t[\n"])
def test_a_json_array_says_how_to_make_lines_of_it(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_text(content)
    message = error_of(read_jsonl(path, "data", "text"))
    assert "begins a JSON array, but each line must be one JSON object: `jq -c '.[]' rows.json > rows.jsonl`" in message


def strings(values):
    """A string array that isn't checked, as a damaged or careless writer makes it."""
    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), pyarrow.array(values, pyarrow.binary()).buffers())


def test_parquet_that_is_no_utf8_names_the_row(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": strings([b"fine"] * 300 + [b"caf\xe9"])}), path)
    assert error_of(read_parquet(path, "data", "text")).startswith(f"{path}: row 300: field 'text' is not UTF-8: ")


def test_strange_parquet_columns(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), path)
    assert error_of(read_parquet(path, "data", "text")) == f"{path}: has 2 fields named 'text': rename all but one"
    parquet.write_table(pyarrow.table({"text": [{"text": "a"}]}), path)
    assert error_of(read_parquet(path, "data", "text")).endswith("row 0: field 'text' must be a string, is a dict")
    parquet.write_table(pyarrow.table({"text": [b"a"]}), path)
    assert error_of(read_parquet(path, "data", "text")).endswith("must be a string, is a bytes")
    parquet.write_table(pyarrow.table({"a": [{"b": 1}], "a.b": ["dotted"], "": ["x"]}), path)
    assert texts(read_parquet(path, "data", "a.b")) == ["dotted"]
    assert "it has a, a.b, '': set" in error_of(read_parquet(path, "data", "text"))
    for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        parquet.write_table(pyarrow.table({"text": pyarrow.array(["é", "b", "é"]).cast(kind)}), path)
        assert texts(read_parquet(path, "data", "text")) == ["é", "b", "é"]


def test_damaged_parquet_is_one_line_or_the_rows(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [f"row {index}" for index in range(100)], "n": range(100)}), path)
    content, messages = path.read_bytes(), []
    for seed in range(100):
        dice, data = random.Random(seed), bytearray(content)
        for _ in range(dice.choice([1, 2, 8])):
            data[dice.randrange(len(data) // 2, len(data))] = dice.randrange(256)
        path.write_bytes(data)
        try:
            texts(read_parquet(path, "data", "text"))
        except DataError as error:
            messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)


ROWS = "".join(json.dumps({"text": f"row {index}"}) + "\n" for index in range(5000)).encode()


def compressed(suffix, content):
    if suffix == ".zst":
        return pyarrow.Codec("zstd").compress(content, asbytes=True)
    return {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(content)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_rows(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compressed(suffix, ROWS) + compressed(suffix, b'{"text": "last"}\n'))
    assert texts(read_jsonl(path, "data", "text")) == [f"row {index}" for index in range(5000)] + ["last"]
    whole = compressed(suffix, ROWS)
    for cut in (1, 9, len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[: len(whole) - cut])
        assert error_of(read_jsonl(path, "data", "text")).startswith(f"{path}: ")
    path.write_bytes(ROWS)
    assert f"{path}: not readable as {suffix}" in error_of(read_jsonl(path, "data", "text"))
    path.unlink()
    assert error_of(read_jsonl(path, "data", "text")) == f"{path}: No such file or directory"
