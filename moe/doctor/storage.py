"""The disk that a folder is on: room, speed, locks, and whether all ranks' machines share it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from moe.distributed.environment import world_from_environment
from moe.doctor.finding import Finding

LITTLE = 5e9  # bytes
PROBE = 32 << 20  # bytes written to measure
NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "cifs", "smb", "9p", "glusterfs", "wekafs", "virtiofs")
SHARED_SECONDS = 8.0


def disk(name: str, folder: Path) -> list[Finding]:
    """Writes, syncs, renames and locks a file where `folder` is, or would be made."""
    place = _existing(folder)
    kind = _file_system(place)
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".moe-doctor-") as made:
            rate = _write(Path(made))
            locks = _locks(Path(made))
    except OSError as error:
        return [Finding(name, "fail", f"{folder}: can't write to {place}: {error.strerror}", f"{name}=… elsewhere")]
    free = shutil.disk_usage(place).free
    text = f"{folder}: {free / 1e9:.1f} GB free on {kind}, {rate / 1e6:,.0f} MB/s written and synced"
    if not locks:
        fix = "two jobs could write one run directory: mount it with locks (NFS: without nolock)"
        return [Finding(name, "fail", f"{text}; locks have no effect", fix)]
    if free < LITTLE:
        return [
            Finding(name, "note", text, "a checkpoint takes 12 bytes a parameter; checkpoint.keep bounds their number")
        ]
    return [Finding(name, "ok", text)]


def shared(folder: Path) -> list[Finding]:
    """Under torchrun on several machines: whether every rank sees the others' files within seconds."""
    rank, world, _, local_world = world_from_environment()
    place = _existing(folder)
    if world == local_world:
        kind = _file_system(place)
        note = (
            "a network file system"
            if kind.startswith(NETWORK)
            else "of this machine only; several nodes need one that they share"
        )
        return [Finding("shared files", "ok", f"{folder} is on {kind}, {note}")]
    session = f"{os.environ.get('TORCHELASTIC_RUN_ID', 'none')}-{os.environ.get('MASTER_PORT', '')}"
    files = [place / f".moe-doctor-{session}-{other}" for other in range(world)]
    files[rank].write_text(str(time.time()), encoding="ascii")
    deadline = time.monotonic() + SHARED_SECONDS
    missing = files
    while missing and time.monotonic() < deadline:
        missing = [path for path in files if path.name not in os.listdir(place)]
        time.sleep(0.2)
    time.sleep(1.0)  # the others look too
    files[rank].unlink(missing_ok=True)
    if missing:
        ranks = ", ".join(path.name.rpartition("-")[2] for path in missing)
        fix = "run_dir=… on a file system that all nodes share"
        return [Finding("shared files", "fail", f"rank {rank} doesn't see the files of ranks {ranks} in {place}", fix)]
    return [Finding("shared files", "ok", f"all {world} ranks see each other's files in {place}")]


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _write(folder: Path) -> float:
    """Bytes per second of one file, written, synced and renamed."""
    data = os.urandom(1 << 20)
    begin = time.perf_counter()
    with (folder / "new").open("wb") as file:
        for _ in range(PROBE // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    (folder / "new").rename(folder / "renamed")
    return PROBE / (time.perf_counter() - begin)


def _locks(folder: Path) -> bool:
    """Whether a second lock of one file is refused."""
    with (folder / "lock").open("w") as first, (folder / "lock").open("w") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _file_system(place: Path) -> str:
    """The type of the mount that `place` is on."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, mount, found, *_ = line.split(" ")
        mount = mount.encode().decode("unicode_escape")
        if len(mount) >= len(best) and place.resolve().is_relative_to(mount):
            best, kind = mount, found
    return kind
