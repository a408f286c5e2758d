"""Files that somebody else wrote: only regular ones, of a sensible size, with values of the right type and range."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moe.errors import UserError
from moe.untrusted import Values, json_lines, open_regular, read_json, read_object, read_small, shown

pytestmark = pytest.mark.timeout(20)


def odd_file(path: Path, kind: str) -> None:
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder"])
@pytest.mark.parametrize("mode", ["rb", "ab"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str, mode: str) -> None:
    odd_file(tmp_path / "file", kind)
    with pytest.raises(UserError, match=f"^{tmp_path / 'file'}: must be a regular file, not a {kind}: remove it$"):
        open_regular(tmp_path / "file", mode)


def test_a_missing_file_is_an_os_error_and_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "file")
    (tmp_path / "real").write_bytes(b"1")
    (tmp_path / "file").symlink_to("real")
    assert read_json(tmp_path / "file") == 1


def test_a_link_is_not_written(tmp_path: Path) -> None:
    for target in (tmp_path / "outside", tmp_path / "missing", tmp_path / "file"):
        (tmp_path / "outside").write_bytes(b"1")
        (tmp_path / "file").unlink(missing_ok=True)
        (tmp_path / "file").symlink_to(target)
        with pytest.raises(UserError, match="must be a regular file, not a link: remove it"):
            open_regular(tmp_path / "file", "ab")
    assert (tmp_path / "outside").read_bytes() == b"1"
    assert not (tmp_path / "missing").exists()


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="has 1,099,511,627,776 bytes, and at most 16,777,216 are read"):
        read_small(tmp_path / "file")
    with pytest.raises(UserError, match="file:1: the line has more than 16,777,216 bytes"):
        list(json_lines(tmp_path / "file"))


@pytest.mark.parametrize("text", ["{", "NaN", '{"a": Infinity}', "[" * 100_000, "9" * 5000, "\ud800"])
def test_what_is_no_json_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=f"^{tmp_path / 'file'}: [^\n]*$"):
        read_json(tmp_path / "file")


BAD_COUNTS = [-1, 10**15 + 1, 10**400, True, 1.0, "1", None, [1], {"a": 1}]


@pytest.mark.parametrize("value", BAD_COUNTS, ids=lambda value: str(value)[:10])
def test_a_count_is_a_whole_number_in_its_range(value: object) -> None:
    with pytest.raises(UserError, match=r"^state.json: step=.{1,50} must be a whole number from 0 to 10{15}; fix$"):
        Values({"step": value}, "state.json", "fix").count("step")


def test_a_missing_key_and_an_object_that_is_none_are_named(tmp_path: Path) -> None:
    values = Values({"inner": {"text": 3}, "list": []}, "f", "fix")
    with pytest.raises(UserError, match=r"^f: step is missing: it must be a whole number from 0"):
        values.count("step")
    with pytest.raises(UserError, match=r"^f: inner.text=3 must be text; fix$"):
        values.object("inner").text("text")
    with pytest.raises(UserError, match=r"^f: list=\[\] must be an object; fix$"):
        values.object("list")
    (tmp_path / "list").write_text("[1]")
    with pytest.raises(UserError, match=r"list: must be a JSON object, not \[1\]; fix$"):
        read_object(tmp_path / "list", "fix")


def test_torn_lines_have_no_value_and_keep_their_place(tmp_path: Path) -> None:
    lines = [b'{"step": 1}', b"", b'{"st', b"[1]", b"[" * 100_000, json.dumps({"step": 2}).encode()]
    (tmp_path / "file").write_bytes(b"\n".join(lines))
    found = list(json_lines(tmp_path / "file"))
    assert [(line.number, line.value) for line in found] == [
        (1, {"step": 1}), (3, None), (4, None), (5, None), (6, {"step": 2})
    ]  # fmt: skip
    content = (tmp_path / "file").read_bytes()
    assert all(content[line.offset :].startswith(line.raw) for line in found)


def test_a_deeply_nested_value_is_shown_without_its_contents() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "a deeply nested list"
    assert shown([1, "a"]) == '[1, "a"]'
