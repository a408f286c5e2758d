"""Writing a checkpoint: a snapshot on the training thread, the rest beside it. `moe.dist.checkpoint` tells the layout.

Order of a save, so that a folder without the `.partial` ending is always whole:

1. Every rank copies the tensors it will write into its host's memory. Nobody writes a tensor twice, and each rank
   about as many bytes. Training waits for this step alone.
2. Into `step_N.partial` every rank writes its shards, fsyncs and hashes them.
3. When all could, rank 0 checks that it sees every file (a run directory that nodes don't share stops here), writes
   state.json, config.yaml and the manifest, fsyncs all of it, renames the folder, fsyncs its parent, and only then
   moves `latest` and removes what is no longer kept.

Steps 2 and 3 run in a thread with a process group of its own, so that its collectives never meet training's.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from moe.config import CheckpointConfig
from moe.dist.checkpoint import MANIFEST, Experts, TrainState, committed, sha256, step_of
from moe.dist.engine import Engine
from moe.dist.master import KINDS
from moe.dist.topology import Topology
from moe.durable import PARTIAL, fsync, write_durably

LONGEST_SAVE = timedelta(
    days=1
)  # a rank may wait so long for a slower one's disk; training's own collectives see the dead
FILE_BYTES = 2 << 30  # of one safetensors file; it is put together in memory


@dataclass(slots=True)
class _Snapshot:
    """What is written: this rank's share of the tensors, and texts for rank 0."""

    folder: Path
    step: int
    parts: dict[str, dict[str, Tensor]]  # {"model" | "optimizer": {name in the file: tensor}}
    texts: dict[str, str]
    file_numbers: dict[str, int]  # name in the file → which of the numbered files it goes to


class Saver:
    """Saves one run's checkpoints. Every method is a collective: all ranks call it, in the same order.

    `say` and `warn` show a line to the user; `beat` is told, while the caller waits, each time the save has come
    further. At most one save is under way: another waits for its end.
    """

    def __init__(
        self,
        run_dir: Path,
        topology: Topology,
        config: CheckpointConfig,
        say: Callable[[str], None],
        warn: Callable[[str], None],
        beat: Callable[[str], None] | None = None,
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self.failures = 0  # in a row
        self._topology, self._config = topology, config
        self._say, self._warn, self._beat = say, warn, beat
        self._doing = ""  # the thread's part of the work
        group = dist.new_group(backend="gloo", timeout=LONGEST_SAVE)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._experts: Experts | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, engine: Engine, state: TrainState, config_yaml: str) -> None:
        """Begin a save after the end of the one before; `checkpoint.background=false` ends it too. Raises as `wait`."""
        started = time.perf_counter()
        self.wait()
        snapshot = self._snapshot(engine, state, config_yaml)
        waited = time.perf_counter() - started
        self._thread = threading.Thread(target=self._run, args=(snapshot, waited), name="checkpoint", daemon=True)
        self._thread.start()
        if not self._config.background:
            self.wait()

    def wait(self) -> bool:
        """Until the save under way has ended; whether the last one succeeded.

        Raises ValueError once `checkpoint.max_failures` in a row have failed: to train on unsaved is to lose more.
        """
        if self._thread is not None:
            self._join(self._thread)
            self._thread = None
            error, self._error = self._error, None
            if error is not None and not isinstance(error, OSError):
                raise error
            self.failures = 0 if error is None else self.failures + 1
            if self.failures >= self._config.max_failures:
                raise ValueError(
                    f"{self.failures} saves in a row have failed (checkpoint.max_failures), the last one: {error}; "
                    "training stops here: once there is room, the same command goes on from the newest checkpoint"
                ) from error
        return self.failures == 0

    def _join(self, thread: threading.Thread) -> None:
        """A slow disk may take an hour: what hangs is a save that doesn't come further."""
        before = None
        while thread.is_alive():
            thread.join(1.0)
            written = 0
            for path in self._my_files(self.folder):
                with contextlib.suppress(FileNotFoundError):  # the folder was renamed meanwhile
                    written += path.stat().st_size
            if self._beat is not None and (self._doing, written) != before:
                before = (self._doing, written)
                self._beat(f"the save, {self._doing}")

    def _my_files(self, folder: Path) -> list[Path]:
        """This rank's shards under way in `checkpoints` by the writer's names; its counting starts at 1."""
        return sorted(folder.glob(f"step_*{PARTIAL}/*/shard-{self._topology.rank + 1:05d}-*"))

    def _snapshot(self, engine: Engine, state: TrainState, config_yaml: str) -> _Snapshot:
        sizes, topology = engine.master.sizes(), self._topology
        mine = owned(sizes, engine.expert_names, topology.rank, topology.world_size, topology.expert)
        tensors = engine.master.gather(mine)
        experts = self._experts = self._experts or Experts(engine.expert_names, topology)
        parts: dict[str, dict[str, Tensor]] = {"model": experts.sharded(tensors["weights"]), "optimizer": {}}
        for kind in KINDS[1:]:
            parts["optimizer"] |= {f"{kind}.{name}": t for name, t in experts.sharded(tensors[kind]).items()}
        texts = {"state.json": json.dumps(asdict(state), indent=1) + "\n", "config.yaml": config_yaml}
        folder = self.folder / f"step_{state.step:08d}"
        return _Snapshot(folder, state.step, parts, texts, _file_numbers(sizes))

    def _run(self, snapshot: _Snapshot, waited: float) -> None:
        """The thread: what goes wrong is kept for `wait` to raise or count."""
        started = time.perf_counter()
        try:
            self._write(snapshot)
        except OSError as error:
            self._error = error
            self._warn(str(error))
        except BaseException as error:
            self._error = error
        else:
            self._say(
                f"saved {snapshot.folder}: {_size(snapshot) / 1e6:,.0f} MB a rank in "
                f"{time.perf_counter() - started:.1f} s, for which training waited {waited:.2f} s"
            )

    def _write(self, snapshot: _Snapshot) -> None:
        """Steps 2 and 3. Raises OSError on every rank when any rank could not; older checkpoints stay."""
        topology, partial = self._topology, snapshot.folder.with_name(snapshot.folder.name + PARTIAL)
        try:
            topology.agree(lambda: self._clear(partial), "checkpoint", self._group)
            files = topology.agree(lambda: self._write_shards(snapshot, partial), "checkpoint", self._group)
            everyone: list[dict[str, Any]] = [{}] * topology.world_size
            dist.all_gather_object(everyone, files, group=self._group)
            self._doing = "waiting for rank 0's commit"
            manifest = {name: entry for files in everyone for name, entry in files.items()}
            topology.agree(lambda: self._commit(snapshot, partial, manifest), "checkpoint", self._group)
        except ValueError as error:
            if topology.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free
            raise OSError(
                f"{snapshot.folder}: not saved, {error}; this rank writes {_size(snapshot) / 1e6:.0f} MB, "
                f"{free / 1e6:.0f} MB are free"
            ) from error

    def _clear(self, partial: Path) -> None:
        """Away with what a killed save or removal has left."""
        if self._topology.is_main:
            for torn in self.folder.glob(f"step_*{PARTIAL}"):
                shutil.rmtree(torn)
            partial.mkdir(parents=True)

    def _write_shards(self, snapshot: _Snapshot, partial: Path) -> dict[str, Any]:
        """This rank's files, on the disk: {name in the checkpoint: size and SHA-256}."""
        self._doing = "writing shards"
        try:
            for part, tensors in snapshot.parts.items():
                writer = HuggingFaceStorageWriter(
                    str(partial / part), fqn_to_index_mapping=snapshot.file_numbers, save_distributed=True
                )
                state_dict_saver.save(tensors, storage_writer=writer, process_group=self._group)
        except CheckpointException as error:  # raised on all ranks when any failed; not an Exception
            first = next(iter(error.failures.values()))[0]
            raise OSError(f"{partial}: could not be written ({first})") from error
        files = {}
        for path in self._my_files(self.folder):
            name = str(path.relative_to(partial))
            self._doing = f"hashing {name}"
            fsync(path)
            files[name] = _entry(path)
        for part in snapshot.parts:
            fsync(partial / part)
        return files

    def _commit(self, snapshot: _Snapshot, partial: Path, manifest: dict[str, Any]) -> None:
        if not self._topology.is_main:
            return
        for name, entry in manifest.items():
            path = partial / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise OSError(
                    f"{path}: another rank wrote it, but rank 0 doesn't see it: run_dir must lie on a file system "
                    "that all nodes share"
                )
        for name, text in snapshot.texts.items():
            write_durably(partial / name, text)
            manifest[name] = _entry(partial / name)
        write_durably(partial / MANIFEST, json.dumps(manifest, indent=1))  # the last byte matters: a cut is seen
        if snapshot.folder.exists():  # a damaged one, which the resume passed over
            _remove(snapshot.folder)
        partial.rename(snapshot.folder)
        fsync(self.folder)
        write_durably(self.folder / "latest", snapshot.folder.name + "\n")
        # Newer ones are damaged, or the resume would have taken them: they must not crowd out the whole ones.
        saved = [path for path in committed(self.folder) if step_of(path) <= snapshot.step]
        for path in saved[self._config.keep :]:
            if self._config.keep_every is None or step_of(path) % self._config.keep_every:
                _remove(path)


def owned(sizes: dict[str, int], experts: set[str], rank: int, world_size: int, degree: int) -> set[tuple[str, str]]:
    """{(kind, parameter name)} that `rank` writes: each tensor, or each slice of an expert tensor, goes to the one
    with the fewest elements so far among the ranks that have it."""
    load = [0] * world_size
    mine = set()
    for kind in KINDS:
        for name, size in sizes.items():
            slices = degree if name in experts else 1
            for first in range(slices):
                owner = min(range(first, world_size, slices), key=load.__getitem__)
                load[owner] += size
                if owner == rank:
                    mine.add((kind, name))
    return mine


def _file_numbers(sizes: dict[str, int]) -> dict[str, int]:
    """Name in the file → number of the file, from 1: as many tensors in each as make about `FILE_BYTES`."""
    numbers, number = {}, 1
    for kind in KINDS:
        filled, number = 0, 1
        for name, size in sizes.items():
            if filled and filled + 4 * size > FILE_BYTES:
                filled, number = 0, number + 1
            filled += 4 * size
            numbers[name if kind == "weights" else f"{kind}.{name}"] = number
    return numbers


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _size(snapshot: _Snapshot) -> int:
    """Bytes of this rank's share."""
    return sum(tensor.nbytes for tensors in snapshot.parts.values() for tensor in tensors.values())


def _remove(folder: Path) -> None:
    """A kill in the middle leaves no folder that looks whole."""
    torn = folder.rename(folder.with_name(f"{folder.name}.old{PARTIAL}"))
    shutil.rmtree(torn)
