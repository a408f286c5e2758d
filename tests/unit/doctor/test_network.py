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


@pytest.mark.parametrize("port", ["abc", "0", "65536", "1" * 5000, "٣"])
def test_a_port_that_is_none_fails_and_hides_nothing(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MASTER_PORT", port)
    found = {one.name: one for one in network.ports()}
    assert found["MASTER_PORT"].state == "fail"
    assert "host name" in found
