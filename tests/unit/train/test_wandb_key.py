"""Where W&B would find a key, and what would stop it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe.train.wandb_key import BASE_URL, NETRC, find_key
from tests.unit.train.test_tracking import NETRCS, URLS


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", NETRC, BASE_URL):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_key_of_the_environment_or_of_netrc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_key() == (False, {})
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password 0123\n")
    assert find_key() == (True, {})
    monkeypatch.setenv(BASE_URL, "http://localhost:8080")
    assert find_key() == (False, {}), "the key of another server"
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert find_key() == (True, {})


@pytest.mark.parametrize("content", NETRCS)
def test_a_netrc_that_cannot_be_read_is_named(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_bytes(content)
    monkeypatch.setenv(NETRC, str(tmp_path / "netrc"))
    found, wrong = find_key()
    assert not found
    assert not wrong or (str(tmp_path / "netrc") in wrong[NETRC] and "\n" not in wrong[NETRC])


@pytest.mark.parametrize("url", URLS)
def test_an_address_that_is_none_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BASE_URL, url)
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert find_key() == (
        False,
        {BASE_URL: f"WANDB_BASE_URL={url} must be an address as in https://api.wandb.ai"},
    )
