"""Work in several processes: the order of results, what is held, errors, killed processes; shards for any number."""

import csv
import gzip
import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from moe.config import DataConfig, RecordKind, SourceConfig, TokenizerConfig, TokenizerKind
from moe.cores import usable_cpus
from moe.data import file_parts, parts
from moe.data.prepare import prepare
from moe.data.processes import AHEAD, BYTES_EACH, Processes, chosen_processes
from moe.data.readers import DataError
from moe.data.worker import WorkerFault, serve
from moe.errors import UserError

pytestmark = pytest.mark.timeout(200)
ROOT = Path(__file__).parents[3]
MISTRAL = TokenizerConfig(kind=TokenizerKind.mistral)
SLOW_FIRST = ["__import__('time').sleep(0.6) or 0", *(str(number) for number in range(1, 30))]


def gone(pid):
    """Whether a process has ended, or ends within some seconds."""
    for _ in range(300):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_order_and_only_so_many_wait(count):
    taken, given = 0, 0

    def items():
        nonlocal taken
        for item in SLOW_FIRST:
            taken += 1
            assert taken - given <= AHEAD * count + 1
            yield item

    found = []
    with Processes(count) as processes:
        for result in processes.run(eval, items()):
            found.append(result)
            given += 1
        pids = [worker.process.pid for worker in processes._workers]
        assert list(processes.run(len, ["", "a", "bb"])) == [0, 1, 2]  # another job for the same processes
    assert found == list(range(30))
    assert len(pids) <= (count if count > 1 else 0)
    assert all(map(gone, pids))


def test_the_first_error_in_order_is_raised_and_the_results_before_it_are_there():
    slow = "__import__('time').sleep(0.5) or __import__('moe.data.readers').data.readers.decode(b'\\xff', 'first', 7)"
    with Processes(3) as processes:
        results = processes.run(eval, ["1", "2", slow, "{}['second']", "5"])
        assert [next(results), next(results)] == [1, 2]
        with pytest.raises(DataError, match=r"^first: byte 7 \(0xff\) is not UTF-8: invalid start byte$") as caught:
            next(results)
        assert isinstance(caught.value.__cause__, UnicodeDecodeError)
        assert list(processes.run(eval, ["3"])) == [3]  # the others go on


def test_what_items_raise_comes_after_the_results_before_it():
    def items():
        yield from ("1", "2")
        raise DataError("the third")

    with Processes(2) as processes:
        results = processes.run(eval, items())
        assert [next(results), next(results)] == [1, 2]
        with pytest.raises(DataError, match="the third"):
            next(results)


def test_a_fault_of_the_program_keeps_its_traceback():
    with Processes(2) as processes, pytest.raises(WorkerFault, match=r"(?s)Traceback.*ZeroDivisionError"):
        list(processes.run(eval, ["1", "1 / 0"]))


PART_OF_A_MESSAGE = struct.pack("!i", 1000) + b"part"  # its length, then less than that
KILL = "__import__('os').kill(__import__('os').getpid(), 9)"
KILL_WHILE_SENDING = f"(__import__('os').write(int(__import__('sys').argv[1]), {PART_OF_A_MESSAGE!r}), {KILL})"


@pytest.mark.parametrize("kill", [KILL, KILL_WHILE_SENDING])
def test_a_killed_process_is_one_line_and_the_others_end(kill):
    with Processes(2) as processes:
        results = processes.run(eval, ["1", kill, "3"])
        with pytest.raises(DataError) as caught:
            list(results)
        pids = [worker.process.pid for worker in processes._workers]
    assert str(caught.value).startswith("data.processes=2: process ")
    assert " was ended by SIGKILL (the kernel does so when memory runs out): run it again, or with" in str(caught.value)
    assert all(map(gone, pids))


def test_a_connected_rank_stays_for_other_work():
    """The result that nobody asks for is dropped; it isn't taken for a later one."""
    ours, theirs = Pipe()
    rank = threading.Thread(target=serve, args=[theirs])
    rank.start()
    with Processes(1, [(ours, "rank 1")]) as processes:
        assert processes.count == 1
        results = processes.run(eval, ["1", "2", "3"])
        assert next(results) == 1
        results.close()
        assert list(processes.run(str, [4, 5])) == ["4", "5"]
    rank.join(10)
    assert not rank.is_alive(), "it ends when its socket closes"


PARENT = """
import sys
from moe.data.processes import Processes
with Processes(2) as processes:
    for pid in processes.run(eval, ["__import__('os').getpid()", "__import__('os').getpid()", *["__import__('time').sleep(1)"] * 99]):
        print(pid, flush=True)
"""  # noqa: E501


def test_no_process_outlives_a_killed_parent():
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        pids = {int(parent.stdout.readline()) for _ in range(2)}
        parent.kill()
    assert all(map(gone, pids))


def test_a_process_ends_without_a_word_when_its_parent_was_killed_while_sending():
    ours, theirs = Pipe()
    command = [sys.executable, "-P", "-m", "moe.data.worker", str(theirs.fileno())]
    with subprocess.Popen(
        command,
        pass_fds=[theirs.fileno()],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as worker:
        theirs.close()
        os.write(ours.fileno(), PART_OF_A_MESSAGE)
        ours.close()
        _, said = worker.communicate(timeout=60)
    assert (worker.returncode, said) == (0, "")


def test_the_number_of_processes(monkeypatch):
    assert chosen_processes(5, 0) == 5
    assert chosen_processes(None, 0) == chosen_processes(None, BYTES_EACH) == 1  # tests and first runs start none
    assert chosen_processes(None, 1 << 40) == usable_cpus()
    for wrong in (0, -1, 1025):
        with pytest.raises(UserError, match=rf"^data\.processes={wrong} must be [^\n]*$"):
            DataConfig(processes=wrong)


def text(dice, words=60):
    common = ["the", "a", "of", "river", "stone", "", "light\nand", "12", "é", "中文", "don't", "▁"]
    return " ".join(dice.choice([*common, str(dice.random())]) for _ in range(dice.randrange(1, words)))


def write(folder):
    """Files of all kinds, with the same and different texts."""
    dice = random.Random(0)
    texts = [text(dice) for _ in range(300)]
    rows = [{"text": one, "prompt": one[:40] or "?", "completion": one + "!"} for one in texts]
    (folder / "books").mkdir(parents=True)
    (folder / "books/long.txt").write_text("\n".join(texts))
    (folder / "books/one_line.txt").write_text("é" * 5000)
    for number in range(5):
        (folder / f"books/{number}.txt").write_text(text(dice, 300))
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    with gzip.open(folder / "more.jsonl.gz", "wt") as file:
        file.writelines(reversed(lines))
    with (folder / "rows.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=50)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write(tmp_path_factory.mktemp("files"))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


NAMES = ("books", "rows.jsonl", "more.jsonl.gz", "rows.csv", "rows.parquet")


@pytest.mark.parametrize("kind", ["documents", "records"])
def test_shards_are_the_same_for_any_number_of_processes(files, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(parts, "PART_BYTES", 20_000)
    monkeypatch.setattr(file_parts, "PART_BYTES", 20_000)
    names = NAMES if kind == "documents" else NAMES[1:]
    records = RecordKind.documents if kind == "documents" else RecordKind.prompt_completion
    made = {}
    for count in (1, 2, 3):
        logged = []
        sources = {f"s{i}": SourceConfig(path=str(files / name), records=records) for i, name in enumerate(names)}
        if kind == "records":
            sources["text"] = SourceConfig(path=str(files / "books"), records=RecordKind.documents)
        data = DataConfig(sources=sources, cache_dir=str(tmp_path / str(count)), held_out=0.2, processes=count)
        corpus = prepare(data, MISTRAL, sequence_length=64, log=logged.append)
        made[count] = corpus.folder.name, contents(corpus.folder), logged[:-1]
        assert (f" in {count} processes in " in logged[-1]) == (count > 1)
    assert made[1] == made[2] == made[3]
    assert made[1][1][Path("meta.json")]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".csv"])
def test_the_first_bad_row_is_named_by_its_line(tmp_path, monkeypatch, count, suffix):
    monkeypatch.setattr(parts, "PART_BYTES", 1024)
    monkeypatch.setattr(file_parts, "PART_BYTES", 1024)
    path = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        lines = ["text", *(f"row {number}" for number in range(200))]
        lines[90], lines[150] = "a,b", "c,d"
        rule = "has 2 fields"
    else:
        lines = [json.dumps({"text": f"row {number}"}) for number in range(200)]
        lines[90], lines[150] = '{"text": 3}', "broken"
        rule = "field 'text' must be a string, is a number"
    with gzip.open(path, "wt") if suffix.endswith(".gz") else path.open("w") as file:
        file.write("\n".join(lines))
    data = DataConfig(path=str(path), cache_dir=str(tmp_path / "cache"), processes=count)
    with pytest.raises(DataError) as caught:
        prepare(data, MISTRAL)
    assert str(caught.value).startswith(f"{path}:91: {rule}")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_preparation_leaves_no_process_and_nothing_that_looks_whole(tmp_path, number):
    path, cache = tmp_path / "text.txt", tmp_path / "cache"
    dice = random.Random(1)
    with path.open("w") as file:
        line = "".join(chr(dice.randrange(0x4E00, 0x9FFF)) for _ in range(100_000))  # one word, so it isn't remembered
        file.writelines(f"{line[at:]}{line[:at]}\n" for at in range(40))
    os.utime(path, (1e9, 1e9))
    command = [sys.executable, "-m", "moe", "prepare", f"data.path={path}", f"data.cache_dir={cache}"]
    command += ["data.processes=2", "tokenizer=mistral", "model.vocab_size=32000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    with process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not list(cache.glob("*.tmp")) and process.poll() is None:
            time.sleep(0.01)
        pids = [int(pid) for pid in children.read_text().split()]
        process.send_signal(number)
        _, said = process.communicate()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: -15, signal.SIGKILL: -9}[number]
    assert said.count("\n") <= 1
    assert pids
    assert all(map(gone, pids))
    whole = [one for one in cache.iterdir() if one.is_dir() and one.suffix != ".tmp"]
    assert not whole
    assert number is not signal.SIGINT or not list(cache.glob("*.tmp"))
