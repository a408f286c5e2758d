"""Files, folders and globs: links, loops, FIFOs, files without permission, and files that are no text."""

import glob
import os
import socket
import tempfile
from pathlib import Path

import pytest

from moe.config import DataConfig, SourceFormat, TokenizerConfig
from moe.data.find import find
from moe.data.prepare import prepare
from moe.data.readers import DataError
from moe.data.sources import open_sources


def names(path, folder, stated=SourceFormat.auto):
    return [str(file.relative_to(folder)) for file in find("data", str(path), stated).files]


def error_of(path, **keys):
    with pytest.raises(DataError) as caught:
        list(open_sources(DataConfig(path=str(path), **keys))[0].chunks())
    assert str(caught.value).isprintable()
    return str(caught.value)


def write(folder, *files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}\n")


def test_globs_match_as_pythons_do(tmp_path):
    write(tmp_path, "a.txt", "b.md", "in/a.txt", "in/deep/a.txt", "in/deep/c.md", ".h/a.txt", "in/.a.txt", "x[1].txt")
    patterns = ("*.txt", "**/*.txt", "**", "in/**/*", "*/a.txt", "**/deep/*", "?.*", "[ab].*", ".h/*", "**/.*", "*")
    for pattern in (*patterns, "in/**/deep/**/*.txt", "**/in/*"):
        matched = (tmp_path / name for name in set(glob.glob(pattern, root_dir=tmp_path, recursive=True)))
        expected = [str(path.relative_to(tmp_path)) for path in sorted(matched) if path.is_file()]
        assert names(tmp_path / pattern, tmp_path) == expected, pattern
    assert names(tmp_path / "x[1].txt", tmp_path) == ["x[1].txt"]


def test_a_relative_glob_is_of_the_working_folder(tmp_path, monkeypatch):
    write(tmp_path, "in/a.txt", "b.txt")
    monkeypatch.chdir(tmp_path)
    assert find("data", "**/*.txt", SourceFormat.auto).files == [Path("b.txt"), Path("in/a.txt")]
    assert find("data", "i*/../b.txt", SourceFormat.auto).files == [Path("in/../b.txt")]


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "**", "loop/**/*.txt"])
def test_a_link_loop_reads_each_file_once(tmp_path, pattern):
    write(tmp_path, "a.txt", "in/b.txt")
    for name in ("loop", "in/up", "in/loop", "other"):
        (tmp_path / name).symlink_to(tmp_path)
    (tmp_path / "in/again.txt").symlink_to(tmp_path / "a.txt")
    found = find("data", str(tmp_path / pattern), SourceFormat.auto)
    assert sorted(path.resolve().name for path in found.files) == ["a.txt", "b.txt"]
    assert found.left["link to a file that is read"] == 1


def test_linked_folders_are_read(tmp_path):
    write(tmp_path, "real/deep/a.txt", "corpus/b.txt")
    (tmp_path / "corpus/link").symlink_to(tmp_path / "real")
    assert names(tmp_path / "corpus", tmp_path) == ["corpus/b.txt", "corpus/link/deep/a.txt"]
    assert names(tmp_path / "corpus/**/deep/*.txt", tmp_path) == ["corpus/link/deep/a.txt"]


def test_what_is_no_file_is_refused_by_name_and_left_out_of_folders(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert error_of(tmp_path / "socket").endswith("socket: is a socket: give a file, folder or glob")
    assert error_of(tmp_path / "pipe.txt").endswith("pipe.txt: is a FIFO: give a file, folder or glob")
    assert error_of("/dev/zero") == "data.path=/dev/zero: is a device: give a file, folder or glob"
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "self.txt").symlink_to("self.txt")
    assert "no such file or folder" in error_of(tmp_path / "self.txt")
    kinds = "left out 5: 3 FIFO, socket or device, 2 broken link"
    assert error_of(tmp_path).endswith(f"the folder holds no files; {kinds}")
    write(tmp_path, "a.txt")
    assert names(tmp_path, tmp_path) == ["a.txt"]


def test_a_folder_says_what_it_took_and_left(tmp_path):
    write(tmp_path, "a.txt", "b.md", "c.pdf", "d.PDF", "e.html", "f.tar.gz", "g.pkl", ".git/x", ".h", "Makefile")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "rows.csv").write_text("text\na\n")
    (source,) = open_sources(DataConfig(path=str(tmp_path)))
    assert source.taken == (
        "source 'text': 5 files (3 text, 1 csv, 1 jsonl); left out 7: 2 hidden, 2 .pdf, 1 .html, 1 .tar.gz, 1 .pkl"
    )
    assert len(list(source.chunks())) == 5
    (one,) = open_sources(DataConfig(path=str(tmp_path / "a.txt")))
    assert one.taken == ""


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("page.html", "HTML, whose tags would be trained on: extract its text first, or say data.format=text"),
        ("paper.PDF", "a document with a layout, not plain text: extract its text"),
        ("letter.docx", "a document with a layout"),
        ("sheet.xlsx", "a spreadsheet: save it as .csv first"),
        ("all.zip", "an archive: unpack it and give the folder"),
        ("all.tar.gz", "an archive: unpack it"),
        ("page.html.gz", "HTML"),
        ("book.txt.lz4", "compressed in a way that is not read (.gz, .bz2, .xz and .zst are): decompress it first"),
        ("rows.arrow", "export it as .parquet, .jsonl or .csv"),
        ("rows.parquet.gz", "a compressed Parquet file: decompress it first"),
        ("photo.jpeg", "image, sound or video, not text"),
        ("model.safetensors", "a binary file, not text"),
        ("model.pt.gz", ".pt files may be pickles"),
    ],
)
def test_files_that_are_no_text_are_refused_with_what_to_do(tmp_path, name, rule):
    write(tmp_path, name)
    for path in (tmp_path / name, tmp_path, tmp_path / "*"):
        assert error_of(path).startswith(f"{tmp_path / name}: ")
        assert rule in error_of(path)


def test_a_stated_format_reads_any_name_but_pickles(tmp_path):
    write(tmp_path, "page.html", "model.pt")
    assert names(tmp_path, tmp_path, SourceFormat.text) == ["page.html"]
    with pytest.raises(DataError, match="never opened"):
        find("data", str(tmp_path / "model.pt"), SourceFormat.text)


def test_binary_text_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("plain words\n" * 9, encoding="utf-16-le")
    assert error_of(tmp_path / "notes.txt").endswith(
        "byte 1 is NUL: the file is UTF-16 or no text; convert it to UTF-8, or leave it out"
    )


def test_a_text_field_that_nothing_reads_is_an_error(tmp_path):
    write(tmp_path, "a.txt")
    assert error_of(tmp_path, text_field="body") == (
        "data.text_field=body is read by no file of this source, which is plain text: leave it out, or state "
        "data.format=jsonl, csv, tsv or parquet"
    )
    (tmp_path / "b.jsonl").write_text('{"body": "a"}\n')
    assert len(list(open_sources(DataConfig(path=str(tmp_path), text_field="body"))[0].chunks())) == 2
    source = {"path": str(tmp_path / "a.txt"), "split": "test"}
    with pytest.raises(DataError, match=r"data\.sources\.x\.split=test is read for data sets only"):
        open_sources(DataConfig(sources={"x": source}))
    source = {"path": "arithmetic", "format": "stdlib"}
    with pytest.raises(ValueError, match=r"data\.text_field belongs to data\.path"):
        DataConfig(sources={"x": source}, text_field="body")


def test_odd_paths_are_one_line(tmp_path):
    assert "no such user's home folder" in error_of("~nobody-of-this-name/x")
    assert error_of("x" * 5000).endswith("File name too long")
    assert "no such file or folder" in error_of("a\0b")
    assert "no such file or folder" in error_of(tmp_path / "a\nb\udcff")


def test_a_file_and_a_folder_without_permission_are_one_line():
    """As a user who isn't root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write(folder, "closed.txt", "shut/a.txt")
        (folder / "closed.txt").chmod(0)
        (folder / "shut").chmod(0)
        root = os.geteuid() == 0
        try:
            if root:
                os.seteuid(65534)
            assert error_of(folder / "closed.txt") == f"{folder / 'closed.txt'}: Permission denied"
            assert error_of(folder / "shut/a.txt").endswith("Permission denied")
            assert error_of(folder) == f"{folder / 'shut'}: Permission denied"
        finally:
            if root:
                os.seteuid(0)
            (folder / "shut").chmod(0o755)


def test_folders_whose_names_are_no_utf8(tmp_path):
    corpus, cache = tmp_path / "in\udcff", tmp_path / "cache\udcff"
    write(corpus, "a.txt", "b.txt")
    (corpus / "c\udcfe.txt").write_text("third\n")
    data = DataConfig(path=str(corpus), cache_dir=str(cache))
    prepared = prepare(data, TokenizerConfig(), log=lambda line: None)
    assert prepared.train[0].documents + prepared.held_out[0].documents == 3
