"""The checks of ports and interfaces, with a port that is really taken."""

import socket

import pytest

from moe.doctor import network


def test_a_taken_port_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        (port,) = [one for one in network.ports() if one.name == "port"]
        assert port.state == "note"
        assert "is taken" in port.found
    (port,) = [one for one in network.ports() if one.name == "port"]
    assert port.state == "ok"


def test_an_interface_that_is_not_there_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope0")
    (found,) = [one for one in network.ports() if one.name == "GLOO_SOCKET_IFNAME"]
    assert found.state == "fail"
    assert "lo" in found.found
