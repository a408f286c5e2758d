"""The check of a folder's disk, and of its being shared, with real files and ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe.doctor import storage


def test_a_folder_that_is_not_there_yet_is_measured_where_it_would_be(tmp_path: Path) -> None:
    (found,) = storage.disk("run_dir", tmp_path / "runs" / "new")
    assert found.state in ("ok", "note")
    assert "MB/s written and synced" in found.found
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_folder_that_cannot_be_written_fails() -> None:
    (found,) = storage.disk("run_dir", Path("/proc/runs"))
    assert found.state == "fail"
    assert "can't write to /proc" in found.found


PROGRAM = """
import sys
from pathlib import Path
from moe.doctor.storage import shared
found, = shared(Path(sys.argv[1]))
print(found.state, found.found)
"""


@pytest.mark.parametrize("seen", [True, False])
def test_ranks_on_two_machines_look_for_each_others_files(tmp_path: Path, seen: bool) -> None:
    """Two ranks that say they are on machines of their own; they share a folder, or each has another."""
    ranks = []
    for rank in range(2):
        folder = tmp_path if seen else tmp_path / str(rank)
        folder.mkdir(exist_ok=True)
        world = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "1"}
        command = [sys.executable, "-c", PROGRAM, str(folder)]
        ranks.append(subprocess.Popen(command, env=os.environ | world, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=60)[0] for process in ranks]
    if seen:
        assert all(text.startswith("ok all 2 ranks see each other's files") for text in said)
    else:
        assert said[0].startswith("fail rank 0 doesn't see the files of ranks 1")
        assert said[1].startswith("fail rank 1 doesn't see the files of ranks 0")
    assert not list(tmp_path.rglob(".moe-doctor*"))
