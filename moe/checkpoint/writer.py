"""Writes checkpoints: a snapshot on the training thread, the rest in a thread of its own.

The steps of a save. A folder without the `.partial` ending is always complete (`moe.checkpoint.layout`):

1. Every rank copies the tensors it will write into its host's memory. No tensor is written twice, and every rank
   writes about as many bytes. Training waits for this step alone.
2. Into `step_N.partial` every rank writes its shards, fsyncs and hashes them.
3. When all ranks have succeeded, rank 0 checks that it sees every file (a run directory that nodes don't share stops
   here) and that the files hold every tensor once, writes state.json, config.yaml, the tokenizer and the manifest,
   fsyncs all of it, renames the folder, fsyncs its parent, and only then updates `latest` and deletes checkpoints that
   are no longer kept.

Steps 2 and 3 run in a thread with a process group of its own, so that its collectives never meet training's.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout

from moe.checkpoint import files, layout
from moe.checkpoint.layout import UNTRAINED
from moe.checkpoint.manifest import entry, shards_of
from moe.checkpoint.ownership import file_numbers, owned
from moe.checkpoint.sharding import ExpertSharding
from moe.checkpoint.state import TrainState
from moe.checkpoint.untrained import copied, saved_dtype, untrained_tensors
from moe.config import CheckpointConfig
from moe.distributed.mesh import Mesh
from moe.distributed.rendezvous import COLLECTIVE_TIMEOUT
from moe.durable import PARTIAL, fsync, write_durably
from moe.engine.base import MOMENTS, Engine
from moe.errors import UserError

# The longest that a rank waits for a slower rank's disk. A dead rank is detected by training's collectives, whose
# timeout is shorter.
LONGEST_SAVE = timedelta(days=1)
VISIBLE_SECONDS = 60.0  # until rank 0 must see the others' files: network file systems cache directories for a while


@dataclass(slots=True)
class _Snapshot:
    """What is written: this rank's share of the tensors, and small files for rank 0."""

    folder: Path
    step: int
    best: int | None  # the step of the best checkpoint so far, which is kept
    parts: dict[str, dict[str, Tensor]]  # {folder: {key in the file: tensor}}
    small_files: dict[str, bytes]
    file_numbers: dict[str, int]  # key in the file → which of the numbered files it goes to
    keys: dict[str, set[str]]  # {folder: keys in the files of all ranks}


class Saver:
    """Saves one run's checkpoints. Every method is a collective: all ranks call it, in the same order.

    `say` and `warn` print a line; while the caller waits, `beat` is called each time the save has come
    further. At most one save is under way: another waits for its end. `tokenizer` goes into every checkpoint.
    """

    def __init__(
        self,
        run_dir: Path,
        mesh: Mesh,
        config: CheckpointConfig,
        say: Callable[[str], None],
        warn: Callable[[str], None],
        beat: Callable[[str], None] | None = None,
        tokenizer: files.SavedTokenizer | None = None,
    ) -> None:
        self.folder = run_dir / layout.CHECKPOINTS
        if mesh.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)  # here: a save must not recreate the run directory
        self.failures = 0  # in a row
        self.failure: OSError | None = None  # the last save's
        self._mesh, self._config = mesh, config
        self._say, self._warn, self._beat, self._tokenizer = say, warn, beat, tokenizer
        self._doing = ""  # the thread's part of the work
        self._shards: list[Path] = []  # of this rank, in the save under way
        group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)
        _set_pg_timeout(LONGEST_SAVE, group)
        self._group = group
        self._store = PrefixStore("saving", _get_default_store())
        self._experts: ExpertSharding | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, engine: Engine, state: TrainState, config_yaml: str) -> None:
        """Waits for the save before, then begins one; `checkpoint.background=false` ends it too. Raises as `wait`."""
        started = time.perf_counter()
        self.wait()
        snapshot = self._snapshot(engine, state, config_yaml)
        waited = time.perf_counter() - started
        self._thread = threading.Thread(target=self._run, args=(snapshot, waited), name="checkpoint", daemon=True)
        self._thread.start()
        if not self._config.background:
            self.wait()

    def wait(self) -> bool:
        """Waits until the save under way has ended; returns whether the last save succeeded.

        Raises UserError once `checkpoint.max_failures` saves in a row have failed, since training on would lose more.
        """
        if self._thread is not None:
            self._join(self._thread)
            self._thread = None
            error, self._error = self._error, None
            if error is not None and not isinstance(error, OSError):
                raise error
            self.failure, self.failures = error, 0 if error is None else self.failures + 1
            if self.failures >= self._config.max_failures:
                raise UserError(
                    f"{self.failures} saves in a row have failed (checkpoint.max_failures), the last one: {error}; "
                    "training stops here: once there is room, the same command goes on from the newest checkpoint"
                ) from error
        return self.failures == 0

    def _join(self, thread: threading.Thread) -> None:
        """Waits for the save. A slow disk may take an hour; a save hangs only when no rank writes anything more."""
        mine, everyone = None, -1
        while thread.is_alive():
            thread.join(1.0)
            written = self._doing, sum(files.bytes_now(path) for path in list(self._shards))
            steps = self._store.add("progress", int(written != mine))
            if self._beat is not None and steps != everyone:
                self._beat(f"the save, {self._doing}")
            mine, everyone = written, steps

    def _snapshot(self, engine: Engine, state: TrainState, config_yaml: str) -> _Snapshot:
        trained, fixed, mesh = engine.optimizer_state.sizes(), untrained_tensors(engine.model), self._mesh
        sizes = {("weights", name): 4 * size for name, size in trained.items()}
        sizes |= {(UNTRAINED, name): saved_dtype(tensor).itemsize * tensor.numel() for name, tensor in fixed.items()}
        sizes |= {
            (moment, name): 4 * size
            for moment in MOMENTS
            for name, size in trained.items()
            if moment in engine.optimizer_state.moments(name)
        }
        mine = owned(sizes, engine.expert_names, mesh.rank, mesh.world_size, mesh.expert_parallel_size)
        tensors = engine.optimizer_state.gather({(kind, name) for kind, name in mine if kind != UNTRAINED})
        tensors[UNTRAINED] = copied(fixed, {name for kind, name in mine if kind == UNTRAINED})
        experts = self._experts = self._experts or ExpertSharding(engine.expert_names, mesh)
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in layout.PARTS}
        for kind, named in tensors.items():
            parts[layout.part_of(kind)].update(
                {layout.key_in_file(kind, name): t for name, t in experts.sharded(named).items()}
            )
        small = files.small_files(state, config_yaml, self._tokenizer)
        keys: dict[str, set[str]] = {part: set() for part in layout.PARTS}
        for kind, name in sizes:
            keys[layout.part_of(kind)].add(layout.key_in_file(kind, name))
        folder = self.folder / layout.folder_name(state.step)
        return _Snapshot(folder, state.step, state.best.get("step"), parts, small, file_numbers(sizes), keys)

    def _run(self, snapshot: _Snapshot, waited: float) -> None:
        """The thread: what goes wrong is kept for `wait` to raise or count."""
        started = time.perf_counter()
        try:
            if self._mesh.device.type == "cuda":
                torch.cuda.set_device(self._mesh.device)  # of a thread of its own
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
        mesh, partial = self._mesh, snapshot.folder.with_name(snapshot.folder.name + PARTIAL)
        self._doing, self._shards = "clearing away", []
        try:
            mesh.agree(lambda: self._clear(partial), "checkpoint", self._group)
            written = mesh.agree(lambda: self._write_shards(snapshot, partial), "checkpoint", self._group)
            everyone: list[dict[str, Any]] = [{}] * mesh.world_size
            self._doing = "waiting for all shards"
            dist.all_gather_object(everyone, written, group=self._group)
            self._doing = "the commit"
            manifest = {name: one for shards in everyone for name, one in shards.items()}
            mesh.agree(lambda: self._commit(snapshot, partial, manifest), "checkpoint", self._group)
        except (OSError, UserError) as error:
            if mesh.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(self.folder.parent).free
            raise OSError(
                f"{snapshot.folder}: not saved, {error}; this rank writes {_size(snapshot) / 1e6:.0f} MB, "
                f"{free / 1e6:.0f} MB are free"
            ) from error
        if mesh.is_main:
            self._tidy(snapshot)

    def _clear(self, partial: Path) -> None:
        """Deletes partial folders left by interrupted saves and removals, to free disk space."""
        if self._mesh.is_main:
            for torn in self.folder.glob(f"{layout.STEP}*{PARTIAL}"):
                self._remove(torn)
            partial.mkdir()

    def _tidy(self, snapshot: _Snapshot) -> None:
        """Updates `latest` and `best`, and deletes checkpoints that are no longer kept. The new checkpoint is complete
        already, so errors here are warnings."""
        names = [layout.LATEST, *([layout.BEST] if snapshot.best == snapshot.step else [])]
        for name in names:
            try:
                write_durably(self.folder / name, snapshot.folder.name + "\n")
            except OSError as error:
                self._warn(f"{self.folder / name} could not be written ({error}); a resume doesn't need it")
        keep_every = self._config.keep_every
        older = [path for path in layout.committed(self.folder) if layout.step_of(path) <= snapshot.step]
        for path in older[self._config.keep :]:
            step = layout.step_of(path)
            if step != snapshot.best and (keep_every is None or step % keep_every):
                self._remove(path)

    def _remove(self, folder: Path) -> None:
        """Deletes a checkpoint. It is renamed to a partial folder first, so that a kill in between leaves none that
        looks complete. If deleting fails (another node may still read it), warns, and the next save tries again."""
        try:
            if folder.suffix != PARTIAL:
                folder = folder.rename(folder.with_name(f"{folder.name}.old{PARTIAL}"))
            shutil.rmtree(folder)
        except OSError as error:
            self._warn(f"{folder} could not be removed ({error})")

    def _write_shards(self, snapshot: _Snapshot, partial: Path) -> dict[str, Any]:
        """This rank's files, on the disk: {name in the checkpoint: size and SHA-256}."""
        from moe.checkpoint.tensor_files import write_tensors

        self._doing = "writing shards"
        for part, tensors in snapshot.parts.items():
            write_tensors(partial / part, tensors, snapshot.file_numbers, self._shards, self._group)
        written = {}
        for path in self._shards:
            name = str(path.relative_to(partial))
            self._doing = f"hashing {name}"
            fsync(path)
            written[name] = entry(path)
        for part in snapshot.parts:
            fsync(partial / part)
        return written

    def _commit(self, snapshot: _Snapshot, partial: Path, manifest: dict[str, Any]) -> None:
        if not self._mesh.is_main:
            return
        from moe.checkpoint.shards import ShardReader

        deadline = time.monotonic() + VISIBLE_SECONDS
        for name, expected in manifest.items():
            while files.bytes_now(partial / name) != expected["bytes"]:
                if time.monotonic() > deadline:
                    raise OSError(
                        f"{partial / name}: another rank wrote it, but rank 0 doesn't see it: run_dir must lie on a "
                        "file system that all nodes share"
                    )
                time.sleep(0.2)
        for part, keys in snapshot.keys.items():
            names = [Path(name).name for name in shards_of(manifest, part)]
            flaw = ShardReader(partial / part, names).flaw(keys)
            assert flaw is None, f"{partial / part}: {flaw}"
        files.write_small_files(partial, snapshot.small_files, manifest)
        if snapshot.folder.exists():  # a damaged one, which the resume passed over
            self._remove(snapshot.folder)
        partial.rename(snapshot.folder)
        fsync(self.folder)


def _size(snapshot: _Snapshot) -> int:
    """Bytes of this rank's share."""
    return sum(tensor.nbytes for tensors in snapshot.parts.values() for tensor in tensors.values())
