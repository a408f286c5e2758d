"""Sockets between rank 0 and the others: strangers are not heard, silence and absence end in time."""

from __future__ import annotations

import socket
import threading

import pytest

from moe.distributed import sockets
from moe.errors import StartError

SECRET = b"s" * sockets.SECRET_BYTES
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(sockets, "CONNECT_SECONDS", 5.0)
    monkeypatch.setattr(sockets, "GREETING_SECONDS", 0.2)
    return sockets._listening(4)


def test_strangers_are_not_heard(server: socket.socket) -> None:
    port = server.getsockname()[1]
    strangers = [socket.create_connection(("localhost", port)) for _ in range(3)]
    strangers[0].sendall(b"x" * (sockets.SECRET_BYTES + sockets.NAME_BYTES))
    strangers[1].close()  # the third one stays silent
    found: list[object] = []
    rank = threading.Thread(target=lambda: found.append(sockets._to_main(port, SECRET, 7)))
    rank.start()
    with server:
        ((ours, name),) = sockets._accepted(server, SECRET, 1)
    rank.join()
    ((theirs, _),) = found  # type: ignore[misc]
    theirs.send({"a": 1})
    assert ours.recv() == {"a": 1}
    assert name == f"rank 7 on {socket.gethostname()}"[: sockets.NAME_BYTES]
    strangers[0].settimeout(5)
    assert strangers[0].recv(1) == b"", "it was closed"


def test_a_rank_that_never_comes_is_one_line(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "CONNECT_SECONDS", 0.3)
    with server, pytest.raises(StartError, match=r"2 of 2 ranks could not connect to rank 0 within 0\.3 s"):
        sockets._accepted(server, SECRET, 2)
    with pytest.raises(StartError, match="rank 3 could not connect to rank 0 at MASTER_ADDR=localhost on port"):
        sockets._to_main(server.getsockname()[1] if server.fileno() >= 0 else 1, SECRET, 3)
