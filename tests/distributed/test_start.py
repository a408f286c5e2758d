"""The start barrier with real processes: a missing rank, a rank with another configuration, a restart."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import time
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from moe.cli import main as cli
from moe.config import Config
from moe.config.data import DataConfig
from moe.distributed import rendezvous
from moe.distributed.meeting import differences, meet
from moe.errors import StartError
from moe.train import run_directory
from tests.ranks import free_port, run_ranks


def _flat(lr: float = 1e-3, **more: object) -> dict[str, object]:
    config = Config(data=DataConfig(path="corpus"))
    config.optim.lr = lr
    return run_directory.flatten(config) | more


def _start(configs: list[dict[str, object]], absent: tuple[int, ...], seconds: str) -> tuple[str, bool, float]:
    """(message, whether this rank prints it, seconds) of a start that must fail; ranks in `absent` don't start."""
    rank = int(os.environ["RANK"])
    os.environ["MOE_START_TIMEOUT"] = seconds
    if rank in absent:
        time.sleep(1.0)
        return "", False, 0.0
    started = time.monotonic()
    with pytest.raises(StartError) as caught:
        rendezvous.start(1, configs[rank])
    return str(caught.value), caught.value.prints, time.monotonic() - started


def _sum_after_start(configs: list[dict[str, object]]) -> float:
    rank = int(os.environ["RANK"])
    mesh = rendezvous.start(1, configs[rank])
    total = float(mesh.sum_(torch.tensor(float(rank))))
    rendezvous.stop()
    return total


def test_ranks_of_one_configuration_start() -> None:
    assert run_ranks(3, _sum_after_start, [_flat()] * 3, timeout=60) == [3.0, 3.0, 3.0]


BUSY = "import time; end = time.monotonic() + 60\nwhile time.monotonic() < end: pass"  # ends if its parent is killed


def _held_after_stop(tries: int) -> int:
    """How often a group's threads still hold the last collective's tensor after `stop`, on a core that is busy."""
    rendezvous.LONGEST_RELEASE = 60.0  # on a busy machine the threads may wait long for the core
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    busy = subprocess.Popen([sys.executable, "-c", BUSY])
    held, groups = 0, []
    try:
        for _ in range(tries):
            mesh = rendezvous.start(1)
            groups.append(dist.group.WORLD)  # as the engine does: the threads outlive `stop`
            dist.all_reduce(torch.ones(4))
            for thread in Path("/proc/self/task").iterdir():
                if "gloo_runloop" in (thread / "comm").read_text():
                    os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))
            tensor = torch.full([4], float(mesh.rank))
            freed = weakref.ref(tensor)
            dist.all_reduce(tensor)
            del tensor
            rendezvous.stop()
            held += freed() is not None
    finally:
        busy.kill()
        busy.wait()
    return held


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's schedulers and /proc")
def test_gloo_holds_no_tensor_after_the_stop() -> None:
    """A thread that frees a tensor while Python ends would abort the process (exit code −6)."""
    assert run_ranks(1, _held_after_stop, 4, timeout=250) == [0]


def test_a_missing_rank_is_named_by_the_others() -> None:
    results = run_ranks(4, _start, [_flat()] * 4, (2,), "3", timeout=60)
    for rank in (0, 1, 3):
        message, _, seconds = results[rank]
        assert message.startswith("rank 2 of 4 did not reach the start within 3 s"), message
        assert "MOE_START_TIMEOUT" in message
        assert seconds < 15
    assert results[0][2] >= 3, "rank 0 waits all the time; a rank that came later only for its verdict"
    assert [prints for _, prints, _ in results] == [True, False, False, False], "printed once"


def test_a_missing_rank_0_is_reported_as_an_unreachable_address() -> None:
    results = run_ranks(2, _start, [_flat()] * 2, (0,), "2", timeout=60)
    message, prints, seconds = results[1]
    assert message.startswith("rank 1 could not reach MASTER_ADDR=127.0.0.1 MASTER_PORT="), message
    assert "is rank 0 of 2 running there?" in message
    assert prints
    assert seconds < 15


def test_a_different_learning_rate_stops_every_rank_with_both_values() -> None:
    configs = [_flat(), _flat(), _flat(lr=0.03)]
    results = run_ranks(3, _start, configs, (), "30", timeout=60)
    for message, _, seconds in results:
        assert "different configurations: optim.lr=0.001 on ranks 0-1, 0.03 on rank 2: start" in message
        assert "\n" not in message
        assert seconds < 10, "no rank waits for the time-out"


def test_a_long_list_of_differences_is_cut_short() -> None:
    texts = [{key: "1" for key in "abcdef"}, {key: "2" for key in "abcde"}]
    message = differences(texts)
    assert "a=1 on rank 0, 2 on rank 1; b=" in message
    assert message.endswith("; and 3 more keys: start every node with the same overrides")
    assert "f=1 on rank 0, nothing on rank 1" in differences([{"f": "1"}, {}])
    assert differences([{"a": "1"}] * 3) == ""


def _meet(port: int, rank: int, session: Any, timeout: float) -> None:
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
    try:
        session.put(meet(store, rank, 2, _flat(), timeout, owns_store=False))
    except StartError as error:
        session.put(f"failed: {error}")


def test_a_restart_starts_in_the_same_store() -> None:
    """torchrun keeps its store: keys of an earlier attempt must neither count for this one nor end it."""
    port, context = free_port(), multiprocessing.get_context("fork")
    server = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    sessions = []
    for attempt in range(3):
        queue = context.Queue()
        # In the second attempt only rank 1 starts; of rank 0 the store has only the keys of the first attempt.
        ranks = (1,) if attempt == 1 else (0, 1)
        timeout = 2.0 if attempt == 1 else 30.0
        processes = [context.Process(target=_meet, args=(port, rank, queue, timeout), daemon=True) for rank in ranks]
        for process in processes:
            process.start()
        sessions.append([queue.get(timeout=30) for _ in ranks])
        for process in processes:
            process.join(10)
    first, alone, third = sessions
    assert first[0] == first[1]
    assert third[0] == third[1] != first[0]
    assert alone[0].startswith("failed: rank 0 of 2 did not reach the start within 2 s"), alone
    assert server.check(["meeting/hello/1"])


@pytest.mark.parametrize("text", ["soon", "0", "-3", "inf", "nan", "1e300"])
def test_a_wrong_timeout_names_the_variable(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MOE_START_TIMEOUT", text)
    with pytest.raises(StartError, match=rf"MOE_START_TIMEOUT={text} must be a number of seconds > 0"):
        rendezvous.start(1)


BAD_NUMBERS = [  # variables of two ranks, and the line
    *(
        ({"RANK": text}, f"RANK={text} must be a whole number from 0 to 1: less than WORLD_SIZE=2")
        for text in ("", "a", "-1", "1e3", "2", "1.0", "９")
    ),
    ({"RANK": "9" * 5000}, r"RANK=9{30} … 9{30} \(5000 characters\) must be a whole number from 0 to 1"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE= must be a whole number from 1 to 131072"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 must be a whole number from 1 to"),
    ({"WORLD_SIZE": "1000000"}, "WORLD_SIZE=1000000 must be a whole number from 1 to"),
    ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3 must be a whole number from 1 to 2: at most WORLD_SIZE=2"),
    ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 must be a whole number from 0 to 1: less than WORLD_SIZE=2"),
    ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1 must be .*: less than LOCAL_WORLD_SIZE=1"),
    *(
        ({"MASTER_PORT": text}, f"MASTER_PORT={text} must be a whole number from 1 to 65535")
        for text in ("0", "70000", "-1", "http", "1e3")
    ),
]


@pytest.mark.parametrize(("variables", "expected"), BAD_NUMBERS, ids=lambda value: str(value)[:40])
def test_a_variable_that_is_no_sensible_number_is_named(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the command: one line, printed by the process itself, which is no rank, and exit code 2."""
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, text in ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} | variables).items():
        monkeypatch.setenv(name, text)
    with pytest.raises(StartError, match=expected):
        rendezvous.start(1)
    monkeypatch.setattr(sys, "argv", ["moe", "train", "engine=deepspeed", "tracking=none"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    error = capsys.readouterr().err
    assert (caught.value.code, len(error.splitlines())) == (2, 1), error
    assert re.search(expected[-100:], error)  # the command shortens a long value, but not its rule


def test_a_mistake_in_the_configuration_is_told_whatever_the_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "first")
    monkeypatch.setattr(sys, "argv", ["moe", "train", "router.top_k=9"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "moe: router.top_k=9 must be ≤ router.num_experts=8\n"


@pytest.mark.parametrize("text", ["a", "0", "-1", "1e3", "4,x", "1025", "9" * 5000])
def test_a_wrong_number_of_threads_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(StartError, match=f"OMP_NUM_THREADS={text} must be a whole number from 1 to 1024"):
        rendezvous.start(1)
    assert not dist.is_initialized()


def test_several_ranks_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(StartError, match=r"WORLD_SIZE=2 but MASTER_ADDR= .*start with torchrun"):
        rendezvous.start(1)


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    held = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for key, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("MASTER_PORT", str(held.port))
    with pytest.raises(StartError, match=rf"rank 0 could not open .*MASTER_PORT={held.port}.*is the port taken\?"):
        rendezvous.start(1)


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for key, value in {"LOCAL_RANK": "2", "RANK": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(StartError, match=r"4 processes on this machine but 2 GPUs: NPROC .* must be ≤ 2") as caught:
        rendezvous.start(1)
    assert caught.value.prints
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("stated", "ranks", "threads"),
    [("3", 1, 3), ("3,2", 1, 3), ("1", 1, 1), ("", 1, None), ("3", 2, 3), ("1", 2, None)],
)
def test_a_process_uses_the_threads_that_the_user_sets(
    stated: str, ranks: int, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several ranks 1 is ignored: torchrun sets it, which would leave cores idle."""
    monkeypatch.setenv("OMP_NUM_THREADS", stated)
    monkeypatch.setattr(rendezvous, "usable_cores", lambda: 8)
    assert rendezvous._threads(ranks) == (threads or 8 // ranks)
