"""Sources: every format gives the same documents, and bad input raises one line that names the place."""

import ast
import itertools
import json
import re

import pytest

from moe.config import DataConfig, SourceFormat
from moe.data import sources, stdlib
from moe.data.file_parts import text_parts
from moe.data.readers import DataError
from moe.data.rows import as_chunk
from moe.data.sources import open_sources

ROWS = ["first document\n", "second, with é and 😀", "third\nover lines\n"]


def read(path, **keys):
    (source,) = open_sources(DataConfig(path=str(path), **keys))
    return list(source.chunks())


def texts(path, **keys):
    return [chunk.text for chunk in read(path, **keys)]


def error_of(path, **keys):
    with pytest.raises(DataError) as caught:
        read(path, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_jsonl(path, rows, field="text"):
    path.write_text("".join(json.dumps({field: row, "n": 1}) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, columns):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_jsonl_one_document_a_line(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS, field="body")
    assert texts(path, text_field="body") == ROWS
    path.write_text(path.read_text() + "\n\n")
    assert texts(path, text_field="body") == ROWS


def test_parquet_one_document_a_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": ROWS, "n": [1, 2, 3]})
    assert texts(path) == ROWS


def test_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ROWS, "n": [1, 2, 3]})
    rows.save_to_disk(str(tmp_path / "one"))
    assert texts(tmp_path / "one") == ROWS
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert texts(tmp_path / "two") == ROWS
    source = {"path": str(tmp_path / "two"), "split": "test"}
    (opened,) = open_sources(DataConfig(sources={"mine": source}))
    assert [chunk.text for chunk in opened.chunks()] == ROWS[:1]
    with pytest.raises(DataError, match=r"data\.sources\.mine\.split=dev must be one of train, test"):
        open_sources(DataConfig(sources={"mine": source | {"split": "dev"}}))
    assert "no field 'body'; it has text, n: set data.text_field" in error_of(tmp_path / "one", text_field="body")


def test_dataset_folder_that_load_dataset_reads(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "rows").mkdir()
    write_jsonl(tmp_path / "rows" / "train.jsonl", ROWS)
    assert texts(tmp_path / "rows", format=SourceFormat.dataset) == ROWS


def test_dataset_code_and_unknown_names_are_refused(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # so that no test waits for the network
    monkeypatch.setattr(pytest.importorskip("huggingface_hub").constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "evil").mkdir()
    script = tmp_path / "evil" / "evil.py"
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "`datasets` can't load it" in error_of(script, format=SourceFormat.dataset)
    assert not (tmp_path / "ran").exists()
    message = "data.path=no-such/name: no such file or folder, and `datasets` can't load it: "
    assert error_of("no-such/name", format=SourceFormat.dataset).startswith(message)
    assert error_of("no-such/name").endswith("a data set on the Hub needs data.format=dataset")
    with pytest.raises(ValueError, match="trust_remote_code"):
        DataConfig(sources={"x": {"path": "a", "trust_remote_code": True}})


@pytest.mark.parametrize("suffix", [".pkl", ".pt", ".bin"])
def test_pickles_are_never_opened(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert error_of(path) == f"{path}: {suffix} files may be pickles, which run code when read: never opened"


def test_folder_and_glob_are_sorted_and_mixed(tmp_path):
    (tmp_path / "b.txt").write_text("b\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("a\n")
    write_jsonl(tmp_path / "c.jsonl", ["c"])
    (tmp_path / ".hidden").write_text("no\n")
    assert texts(tmp_path) == ["b\n", "c", "a\n"]
    assert texts(f"{tmp_path}/**/*.txt") == ["b\n", "a\n"]


def test_chunks_of_a_text_file_join_to_it(tmp_path):
    text = "".join(f"line {i} é😀 {'word ' * (i % 23)}\r\n" for i in range(2000))
    path = tmp_path / "book.txt"
    path.write_bytes(text.encode())
    chunks = read(path)
    assert "".join(chunk.text for chunk in chunks) == text
    assert [chunk.starts_document for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert 30 <= len(chunks) <= 70
    assert all(chunk.text.endswith("\n") and chunk.data == chunk.text.encode() for chunk in chunks)


def test_many_files_are_not_cut(tmp_path):
    for i in range(sources.MIN_CHUNKS):
        (tmp_path / f"{i:03d}.txt").write_text(f"{i}\n" * 2000)
    assert all(chunk.starts_document for chunk in read(tmp_path))


@pytest.mark.parametrize("size", [1024, 1025, 1026, 1027])
def test_a_very_long_line_is_cut_between_characters(tmp_path, size):
    text = "a" + "😀é" * 3000
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    chunks = [chunk for part in text_parts(path, size) for chunk in part.chunks()]
    assert len(chunks) > 5
    assert "".join(chunk.text for chunk in chunks) == text


@pytest.mark.parametrize("place", [0, 5000, 70_000])
def test_not_utf8_names_file_and_byte(tmp_path, place):
    data = bytearray(b"some text\n" * 8000)
    data[place] = 0xFF
    path = tmp_path / "latin.txt"
    path.write_bytes(data)
    assert error_of(path) == f"{path}: byte {place} (0xff) is not UTF-8: invalid start byte"


def test_file_that_ends_within_a_character(tmp_path):
    path = tmp_path / "torn.txt"
    path.write_bytes("ok é".encode()[:-1])
    assert error_of(path) == f"{path}: byte 3 (0xc3) is not UTF-8: unexpected end of data"


def test_jsonl_not_utf8_names_file_and_byte(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    assert error_of(path) == f"{path}: byte 24 (0xe9) is not UTF-8: invalid continuation byte"


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"text": "a"', "broken JSON at column 13: Expecting ',' delimiter: each line must be one JSON object"),
        ("[1, 2]", "must be a JSON object, is a list"),
        ("[" * 100_000, "broken JSON: nested too deeply"),
        ('{"body": "a", "n": 1}', "no field 'text'; it has body, n: set data.text_field"),
        ("{}", "no field 'text'; it has none: set data.text_field"),
        (
            '{"prompt": "a", "completion": "b"}',
            "no field 'text'; it has prompt, completion: add data=sft to train on such rows, or set data.text_field",
        ),
        ('{"text": 3}', "field 'text' must be a string, is a number"),
        ('{"text": null}', "field 'text' must be a string, is null"),
        (r'{"text": "\ud800"}', "field 'text' holds a lone surrogate (U+D800), which is not text"),
    ],
)
def test_bad_jsonl_lines_name_file_and_line(tmp_path, line, rule):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    assert error_of(path) == f"{path}:2: {rule}"


def test_missing_field_names_the_key_of_its_source(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    (source,) = open_sources(DataConfig(sources={"web": {"path": str(path), "text_field": "body"}}))
    with pytest.raises(DataError, match=r"set data\.sources\.web\.text_field"):
        list(source.chunks())


def test_bad_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"body": ["x"], "n": [1]})
    assert error_of(path) == f"{path}: no field 'text'; it has body, n: set data.text_field"
    assert error_of(path, text_field="n") == f"{path}: row 0: field 'n' must be a string, is a number"
    (tmp_path / "b.parquet").write_bytes(b"not parquet at all")
    assert "not readable as Parquet" in error_of(tmp_path / "b.parquet")


def test_missing_files_folders_and_domains_are_named(tmp_path):
    assert "no such file or folder" in error_of(tmp_path / "none.txt")
    assert "the glob matches no file" in error_of(tmp_path / "*.txt")
    assert "the folder holds no files" in error_of(tmp_path)
    with pytest.raises(DataError, match=r"data\.path=poetry must be one of python, prose, arithmetic"):
        open_sources(DataConfig(path="poetry", format=SourceFormat.stdlib))
    with pytest.raises(DataError, match="it names a folder"):
        open_sources(DataConfig(sources={"../x": {"path": "arithmetic", "format": "stdlib"}}))


def test_identity_follows_the_file_and_the_settings(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])

    def identity(**keys):
        return open_sources(DataConfig(path=str(path), **keys))[0].identity

    before = identity()
    assert identity() == before
    assert identity(text_field="body") != before
    write_jsonl(path, ["other text"])
    assert identity() != before


def test_as_chunk_keeps_the_bytes():
    chunk = as_chunk("é", "text", "here")
    assert (chunk.data, chunk.starts_document) == (b"\xc3\xa9", True)


@pytest.mark.parametrize("domain", stdlib.DOMAINS)
def test_builtin_domains_are_the_same_each_time(domain):
    first = list(stdlib.documents(domain))
    assert first == list(stdlib.documents(domain))
    assert len(first) > 50
    assert all(first)
    assert sum(map(len, first)) > 300_000


def test_builtin_python_is_the_source_and_no_module_is_in_two_domains():
    paths = stdlib.files("python")
    assert "".join(stdlib.documents("python")) == "".join(path.read_text(encoding="utf-8") for path in paths)
    assert not set(paths) & set(stdlib.files("prose"))


def test_builtin_arithmetic_is_correct():
    checked = 0
    for document in stdlib.arithmetic():
        for line in document.splitlines()[1:]:
            numbers = [int(number) for number in re.findall(r"-?\d+", line)]
            if " = " in line:
                values = {eval(compile(ast.parse(side, mode="eval"), "", "eval")) for side in line.split(" = ")}
                assert len(values) == 1, line
            elif "divided by" in line:
                a, b, quotient, remainder = numbers
                assert a == b * quotient + remainder, line
                assert 0 <= remainder < b, line
            elif " than " in line or "equal to" in line:
                a, b = numbers
                assert ("greater" in line, "less" in line) == (a > b, a < b), line
            elif "the next is" in line:
                assert len({y - x for x, y in itertools.pairwise(numbers)}) == 1, line
            elif "buys" in line:
                assert numbers[0] + numbers[1] == numbers[2], line
            else:
                assert "gives" in line
                assert numbers[0] - numbers[1] == numbers[2] >= 0, line
            checked += 1
    assert checked > 10_000
