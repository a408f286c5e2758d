"""Storages: what is wrong with one is said in a line; a torn journal; a real PostgreSQL and workers that die."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import optuna
import pytest

from moe.sweep.storage import JOURNAL, masked, open_storage


def test_the_password_is_never_shown() -> None:
    assert masked("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ("mysql://host/db", "must be sqlite:///FILE or postgresql://"),
        ("sqlite:////nowhere/at/all.db", "can't be reached: unable to open database file"),
        (
            "postgresql://me:secret@127.0.0.1:1/db",
            "sweep.storage=postgresql://me:***@127.0.0.1:1/db can't be reached: ",
        ),
    ],
)
def test_a_storage_that_can_not_be_reached_is_one_line(stated: str, said: str, tmp_path: Path) -> None:
    if stated.startswith("postgresql"):
        pytest.importorskip("psycopg", reason="pip install 'moe-train[postgresql]'")
    with pytest.raises(ValueError, match=r"sweep\.storage=") as refused:
        open_storage(stated, tmp_path)
    assert said in str(refused.value)
    assert "secret" not in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_torn_last_line_of_the_journal_is_cut(tmp_path: Path) -> None:
    study = optuna.create_study(study_name="a", storage=open_storage(None, tmp_path))
    study.ask()
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code": 4, "wor')
    again = optuna.load_study(study_name="a", storage=open_storage(None, tmp_path))
    again.ask()
    assert len(optuna.load_study(study_name="a", storage=open_storage(None, tmp_path)).trials) == 2


def test_what_is_no_journal_is_one_line(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text("hello\nworld\n")
    with pytest.raises(ValueError, match=r"study\.journal: not a journal of Optuna"):
        open_storage(None, tmp_path)


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of its own."""
    pytest.importorskip("psycopg", reason="pip install 'moe-train[postgresql]'")
    places = [os.environ.get("PATH", ""), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))]
    path = os.pathsep.join(places)
    initdb, server = shutil.which("initdb", path=path), shutil.which("postgres", path=path)
    if initdb is None or server is None:
        pytest.skip("no PostgreSQL server here (apt-get install postgresql)")
    folder = tmp_path_factory.mktemp("postgresql")
    user: dict[str, object] = {}
    if os.getuid() == 0:  # it refuses to run as root
        user = {"user": "postgres", "group": "postgres", "extra_groups": []}
        for place in takewhile(lambda place: place != Path(tempfile.gettempdir()), (folder, *folder.parents)):
            place.chmod(0o755)
        shutil.chown(folder, "postgres", "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = folder / "data"
    subprocess.run([initdb, "-A", "trust", "-U", "moe", str(data)], check=True, capture_output=True, **user)  # type: ignore[call-overload]
    command = [server, "-D", str(data), "-p", str(port), "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
    with (folder / "log").open("wb") as log:
        running = subprocess.Popen(command, stdout=log, stderr=log, **user)  # type: ignore[call-overload]
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert running.poll() is None, (folder / "log").read_text()
            subprocess.run(["sleep", "0.1"], check=True)
        yield f"postgresql://moe@127.0.0.1:{port}/postgres"
    finally:
        running.send_signal(signal.SIGINT)
        running.wait(60)


WORK = """
import sys, time
from pathlib import Path
from optuna.trial import TrialState
from tests.unit.sweep.test_study import CONTINUOUS, _definition, _study, _trained
folder, storage = Path(sys.argv[1]), sys.argv[2]
study = _study(folder, _definition(CONTINUOUS, trials=12), storage)
while (claimed := study.claim()) is not None:
    print(claimed.number, flush=True)
    time.sleep(0.3)
    study.finish(claimed, TrialState.COMPLETE, _trained(claimed))
"""


@pytest.mark.timeout(600)
def test_workers_on_postgresql_killed_in_mid_trial(postgresql: str, tmp_path: Path) -> None:
    def worker() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WORK, str(tmp_path), postgresql]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    workers = [worker() for _ in range(3)]
    for one in workers[:2]:
        assert one.stdout is not None
        one.stdout.readline()  # it has a trial
        one.kill()
    last = worker()
    for one in (workers[2], last):
        assert one.wait(500) == 0
    for one in workers[:2]:
        one.wait(10)
    study = optuna.load_study(study_name="study", storage=open_storage(postgresql, tmp_path))
    finished = [trial for trial in study.trials if trial.state is optuna.trial.TrialState.COMPLETE]
    assert len(finished) == len(study.trials) == 12
    assert len({trial.params["router.aux_loss_coef"] for trial in finished}) == 12


def test_a_machine_without_a_heartbeat_has_lost_its_trial(postgresql: str, tmp_path: Path) -> None:
    import psycopg

    from tests.unit.sweep.test_study import CONTINUOUS, _definition, _study

    definition, address = _definition(CONTINUOUS, trials=99), postgresql.replace("/postgres", "/template1")
    trial = _study(tmp_path, definition, address).claim()
    assert trial is not None
    trial.lease.close()
    (trial.run_dir / ".lease").write_text('{"host": "another-machine"}')
    near = _study(tmp_path, definition, address)
    claimed = near.claim()
    assert claimed is not None
    assert claimed.number == 1, "the other machine's heart still beats"
    with psycopg.connect(address) as connection:
        connection.execute("UPDATE trial_heartbeats SET heartbeat = heartbeat - interval '10 minutes'")
    again = near.claim()
    assert again is not None
    assert again.number == 0
