"""The content of prepared shards is checked once on each machine, and again when asked for."""

import json
import multiprocessing
import os
import tempfile
import time

import numpy as np
import pytest

from moe.data.readers import DataError
from moe.data.shards import StreamWriter, TokenStream, token_dtype
from moe.data.verify import verify

SHARDS = ["00000.bin", "00001.bin", "documents.bin"]


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """The notes of a machine that has checked nothing yet."""
    folder = tmp_path / "machine"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def meta(tmp_path):
    writer = StreamWriter(tmp_path / "corpus", token_dtype(50), 100)
    for length in (30, 60, 60):
        writer.start_document()
        writer.write(list(range(length // 3)) * 3)
    return writer.close()


def check(tmp_path, meta, vocab_size=50, again=False, log=lambda line: None):
    stream = TokenStream(tmp_path / "corpus", meta, token_dtype(50), vocab_size)
    return verify(tmp_path / "corpus", [stream], again=again, log=log)


def flip(path, at=-1, keep_mtime=False):
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    if keep_mtime:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_all_files_are_read_once_on_a_machine(tmp_path, meta, machine):
    assert {path.name: digest for path, digest in check(tmp_path, meta).items()} == meta["sha256"]
    assert check(tmp_path, meta) == {}
    logged = []
    assert len(check(tmp_path, meta, again=True, log=logged.append)) == 3
    assert logged == [f"verified 3 files, 0.0 MB: {tmp_path / 'corpus'}"]
    machine.rename(tmp_path / "another machine's")
    machine.mkdir()
    assert len(check(tmp_path, meta)) == 3


@pytest.mark.parametrize("keep_mtime", [False, True])
@pytest.mark.parametrize("name", SHARDS[:2])
def test_changed_bytes_are_found_and_the_file_is_named(tmp_path, meta, name, keep_mtime):
    check(tmp_path, meta)
    flip(tmp_path / "corpus" / name, at=0, keep_mtime=keep_mtime)
    for _ in range(2):  # read, then remembered
        with pytest.raises(DataError, match=rf"{name}: holds other bytes than were written \(SHA-256 differs\)"):
            check(tmp_path, meta)


def test_bytes_that_a_disk_changed_are_found_when_asked_for(tmp_path, meta, machine):
    check(tmp_path, meta)
    flip(tmp_path / "corpus" / "00001.bin", at=0)
    (note,) = (machine / f"moe-verified-{os.getuid()}").iterdir()
    known = json.loads(note.read_text())
    for file in known["files"]:  # a disk's own error leaves the times as they were
        stat = os.stat(file[0])
        file[2:] = stat.st_mtime_ns, stat.st_ctime_ns
    note.write_text(json.dumps(known))
    assert check(tmp_path, meta) == {}
    with pytest.raises(DataError, match=r"00001\.bin: holds other bytes"):
        check(tmp_path, meta, again=True)


def test_token_ids_and_documents_are_checked_without_hashes_too(tmp_path, meta):
    del meta["sha256"]
    assert len(check(tmp_path, meta)) == 3
    with pytest.raises(DataError, match=r"00000\.bin: token id 19 must be < the tokenizer's vocabulary, 19"):
        check(tmp_path, meta, vocab_size=19, again=True)
    path = tmp_path / "corpus" / "documents.bin"
    for positions in ([0, 90, 30, 150], [0, 30, 30, 150], [0, 30, 150, 150]):
        np.array(positions, "<i8").tofile(path)
        with pytest.raises(DataError, match=r"documents\.bin: a document doesn't begin after the one before"):
            check(tmp_path, meta)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 1}'])
def test_an_incomplete_note_is_no_note(tmp_path, meta, machine, content):
    check(tmp_path, meta)
    (note,) = (machine / f"moe-verified-{os.getuid()}").iterdir()
    note.write_text(content)
    assert len(check(tmp_path, meta)) == 3
    assert check(tmp_path, meta) == {}


def test_a_machine_without_room_for_notes_checks_every_time(tmp_path, meta, machine):
    machine.rmdir()
    machine.write_text("")
    logged = []
    for _ in range(2):
        assert len(check(tmp_path, meta, log=logged.append)) == 3
    assert len(logged) == 2
    assert logged[0].startswith("can't remember that a corpus was checked, so it is checked at every start: ")


def _check_in_process(tmp_path, meta, queue):
    queue.put(len(check(tmp_path, meta)))


@pytest.mark.timeout(60)
def test_of_many_processes_one_reads(tmp_path, meta):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_check_in_process, args=(tmp_path, meta, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    assert sorted(queue.get(timeout=30) for _ in processes) == [0, 0, 0, 3]
    for process in processes:
        process.join(timeout=10)
        assert process.exitcode == 0


def test_a_known_corpus_costs_no_time(tmp_path, machine):
    writer = StreamWriter(tmp_path / "corpus", token_dtype(50))
    writer.start_document()
    writer.write([1] * 20_000_000)
    meta = writer.close()
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        check(tmp_path, meta)
        seconds.append(time.perf_counter() - started)
    assert min(seconds[1:]) < min(0.01, seconds[0] / 3)
