"""What the entry point does before and after a command."""

from __future__ import annotations

import os
import sys

import pytest

from moe.cli import main
from moe.errors import lost_rank


@pytest.mark.parametrize("value", ["9" * 6000, "²", "-1", "wide"])
def test_a_terminal_of_no_size_is_forgotten(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", value)
    monkeypatch.setenv("LINES", "50")
    monkeypatch.setattr(sys, "argv", ["moe", "--help"])
    main.main()
    assert "COLUMNS" not in os.environ
    assert os.environ["LINES"] == "50"
    assert capsys.readouterr().err == ""


def test_only_a_lost_connection_is_another_ranks_end() -> None:
    assert lost_rank(RuntimeError("shapes differ")) is None
    line = lost_rank(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1.\nmore"))
    assert line is not None
    assert line.endswith("says why ([pair.cc:553] Connection closed by peer [127.0.0.1]:1.)")
    assert lost_rank(RuntimeError("[pair.cc:457] writev [127.0.0.1]:1: Broken pipe")) is not None
