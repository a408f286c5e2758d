"""A socket between rank 0 and each other rank, for what collectives can't do: work that is handed out as ranks ask for
it. Objects travel pickled, so each rank shows a secret of this start, which only its ranks know, before it is heard."""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import time
from contextlib import suppress
from multiprocessing.connection import Connection

from moe.distributed.mesh import Mesh
from moe.errors import StartError

CONNECT_SECONDS = 60.0
GREETING_SECONDS = 5.0  # that a stranger may keep rank 0 waiting
SECRET_BYTES = 32
NAME_BYTES = 128  # of a rank's name, filled up with spaces


def connect_ranks(mesh: Mesh) -> list[tuple[Connection, str]]:
    """(socket, name of the rank behind it): on rank 0 one for each other rank, on any other rank the one to rank 0. A
    collective. Raises StartError."""
    server = _listening(mesh.world_size) if mesh.is_main else None
    secret, port = mesh.from_main((secrets.token_bytes(SECRET_BYTES), server.getsockname()[1] if server else 0))
    if server is None:
        return mesh.agree(lambda: [_to_main(port, secret, mesh.rank)], "connection")
    with server:
        return mesh.agree(lambda: _accepted(server, secret, mesh.world_size - 1), "connection")


def _listening(backlog: int) -> socket.socket:
    """On all interfaces: which of them the other nodes reach isn't known here."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=backlog, dualstack_ipv6=both)


def _accepted(server: socket.socket, secret: bytes, ranks: int) -> list[tuple[Connection, str]]:
    found: list[tuple[Connection, str]] = []
    until = time.monotonic() + CONNECT_SECONDS
    while len(found) < ranks:
        server.settimeout(max(0.01, until - time.monotonic()))
        try:
            peer, _ = server.accept()
        except TimeoutError:
            raise StartError(
                f"{ranks - len(found)} of {ranks} ranks could not connect to rank 0 within {CONNECT_SECONDS:g} s: do "
                "the nodes reach MASTER_ADDR on any port?",
                prints=True,
            ) from None
        with suppress(OSError):  # of a stranger, or of one that went away
            peer.settimeout(GREETING_SECONDS)
            greeting = _read(peer, SECRET_BYTES + NAME_BYTES)
            if hmac.compare_digest(greeting[:SECRET_BYTES], secret):
                found.append((_connection(peer), greeting[SECRET_BYTES:].decode().rstrip()))
                continue
        peer.close()
    return found


def _to_main(port: int, secret: bytes, rank: int) -> tuple[Connection, str]:
    address = os.environ["MASTER_ADDR"]  # torchrun: the host of rank 0
    try:
        peer = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        name = f"rank {rank} on {socket.gethostname()}".encode()[:NAME_BYTES].decode(errors="ignore")
        peer.sendall(secret + name.encode().ljust(NAME_BYTES))
    except OSError as error:
        raise StartError(
            f"rank {rank} could not connect to rank 0 at MASTER_ADDR={address} on port {port} ({error}): the nodes "
            "must reach each other on any port",
            prints=True,
        ) from error
    return _connection(peer), "rank 0"


def _connection(peer: socket.socket) -> Connection:
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that vanishes is noticed
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(peer.detach())


def _read(peer: socket.socket, count: int) -> bytes:
    """Raises OSError, also at an early end."""
    parts = b""
    while len(parts) < count:
        part = peer.recv(count - len(parts))
        if not part:
            raise ConnectionError("it ended early")
        parts += part
    return parts
