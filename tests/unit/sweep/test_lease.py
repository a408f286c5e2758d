"""Who may train a trial."""

from __future__ import annotations

import os
import time
from pathlib import Path

from moe.sweep.lease import LEASE, take_lease
from moe.sweep.storage import GRACE_SECONDS


def test_a_lease_that_is_held_is_not_given_out(tmp_path: Path) -> None:
    held = take_lease(tmp_path, lost=None)
    assert held is not None
    assert take_lease(tmp_path, lost=True) is None
    held.close()
    again = take_lease(tmp_path, lost=None)
    assert again is not None
    again.close()


def test_another_machines_lease_ends_with_its_heartbeat_or_its_age(tmp_path: Path) -> None:
    (tmp_path / LEASE).write_text('{"host": "another-machine"}')
    assert take_lease(tmp_path, lost=False) is None
    assert take_lease(tmp_path, lost=None) is None
    old = time.time() - GRACE_SECONDS - 60
    os.utime(tmp_path / LEASE, (old, old))
    taken = take_lease(tmp_path, lost=None)
    assert taken is not None
    taken.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [LEASE]


def test_half_a_lease_is_free(tmp_path: Path) -> None:
    (tmp_path / LEASE).write_text('{"host": "anot')
    taken = take_lease(tmp_path, lost=False)
    assert taken is not None
    taken.close()
