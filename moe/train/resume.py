"""Where a run starts from: its own newest checkpoint, other weights (`init_from`), or random ones."""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from moe.adapters.attach import attach, reset_magnitudes
from moe.checkpoint import reader
from moe.checkpoint.base import fill_base, find_base, link_model, model_fingerprint
from moe.checkpoint.layout import CHECKPOINTS, CONFIG, MANIFEST, TOKENIZER
from moe.checkpoint.manifest import lists_any
from moe.checkpoint.state import TrainState, read_state
from moe.config import Config
from moe.config.compose import read_config
from moe.data.corpus import Corpus
from moe.distributed.mesh import Mesh
from moe.engine.base import Engine
from moe.errors import UserError
from moe.interop.hub_folder import is_hub_folder
from moe.interop.start_model import must_be_written, write_start_model
from moe.model.transformer import Transformer
from moe.train import run_directory
from moe.train.progress import Display

# Another file system, another user's files, a file system without hard links.
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP)
BASE = "base"  # folder in the run directory: the model that it starts from, where no checkpoint has it as it is needed


@dataclass(frozen=True, slots=True)
class Start:
    """`resumed` is the run's own checkpoint, `weights` another one, of which only the model is taken; at most one is
    set. `changes`: a line for each thing that was different when it was written. `base` has an adapter's frozen
    weights."""

    resumed: Path | None
    weights: Path | None
    changes: list[str]
    base: Path | None = None


def find_start(config: Config, folder: Path, corpus: Corpus, mesh: Mesh, display: Display) -> Start:
    """Finds and checks the files to start from, before a model is built. A collective. Raises UserError."""
    resumed = reader.newest(folder, mesh, display.warn)
    if resumed is not None:
        changes = mesh.agree(lambda: _changes(resumed, corpus, config), "resume")
        return Start(resumed, None, changes, _base_of(resumed, mesh) if config.adapter.trains_adapter else None)
    if mesh.from_main((folder / MANIFEST).is_file()):
        raise UserError(
            f"run_dir={folder}: holds a model, not a run, which a run's files would damage: init_from={folder} and "
            "another run_dir train it"
        )
    if config.init_from is None:
        return Start(None, None, [])
    weights = _whole_model(Path(config.init_from).expanduser(), config, folder, mesh, display)
    changes = mesh.agree(lambda: _model_changes(weights, corpus, config), "init_from")
    return Start(None, weights, changes, weights if config.adapter.trains_adapter else None)


def _whole_model(path: Path, config: Config, folder: Path, mesh: Mesh, display: Display) -> Path:
    """The checkpoint to start from: that of `path`, or, if the run needs other tensors, one that is made from it in the
    run directory. The latter is removed once read, unless an adapter is trained on it. An adapter's base that another
    run's `checkpoint.keep` might remove is linked into the run directory."""
    source = path if mesh.from_main(is_hub_folder(path)) else _undamaged(path, mesh, display)
    tokens = config.tokenizer.add_special_tokens
    needed = mesh.agree(lambda: mesh.is_main and must_be_written(source, tokens), "init_from")
    base = folder / BASE
    if mesh.from_main(needed):
        display.line(f"reading {path} into {base}")

        def write() -> None:
            if mesh.is_main:
                _make_room(base, source)
                write_start_model(source, base, tokens, config.model.vocab_size)

        mesh.agree(write, "init_from")
        return _undamaged(base, mesh, display)
    if config.adapter.trains_adapter:
        kept = mesh.agree(lambda: _kept(source, base, display) if mesh.is_main else source, "init_from")
        return mesh.from_main(kept)
    return source


def _make_room(base: Path, source: Path) -> None:
    """Removes what an interrupted start left at `base`. Raises UserError for anything else."""
    if not base.is_symlink() and not base.exists():
        return
    if base.is_symlink() or not (base / MANIFEST).is_file() or source.resolve().is_relative_to(base.resolve()):
        raise UserError(
            f"run_dir={base.parent}: {base} is in the way of the weights that the run starts from: name another run_dir"
        )
    shutil.rmtree(base)


def _kept(source: Path, base: Path, display: Display) -> Path:
    """`base`, of links to the files of `source`, where that is a checkpoint that another run may remove; else `source`,
    also where there can be no links."""
    source_run = source.resolve().parent
    if source_run.name != CHECKPOINTS or not lists_any(source, TOKENIZER):
        return source
    _make_room(base, source)
    try:
        link_model(source, base)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        display.warn(
            f"the adapter needs {source}, which must stay, for its files can't be linked into {base} "
            f"({error.strerror}): checkpoint.keep removes older checkpoints if {source_run.parent} is continued"
        )
        return source
    display.line(f"linked {source} into {base}: it can go, and the adapter's base stays")
    return base


def _undamaged(path: Path, mesh: Mesh, display: Display) -> Path:
    found = mesh.agree(lambda: reader.candidates(path, "init_from"), "init_from")
    weights = mesh.from_main(found[0])
    reason = reader.damage(weights, mesh)
    if reason is not None:
        raise UserError(f"init_from={path}: {weights} is damaged: {reason}")
    reader.warn_of_strays(weights, display.warn)
    return weights


def _base_of(checkpoint: Path, mesh: Mesh) -> Path:
    """The base of an adapter's checkpoint; rank 0 reads and checks it for all."""
    return mesh.from_main(
        mesh.agree(lambda: find_base(checkpoint, read_state(checkpoint)) if mesh.is_main else checkpoint, "resume")
    )


def complete_model(start: Start, config: Config, model: Transformer, mesh: Mesh) -> None:
    """Checks that the weights of `init_from` fit a new model, and gives it, with `adapter=lora`, its adapters and its
    frozen weights. A collective. Raises UserError."""
    if start.base is not None:
        mesh.agree(lambda: attach(model, config.adapter, config.train.seed), "adapter")
    if start.weights is not None:
        mesh.agree(lambda: _check_fit(start, config, model, mesh), "init_from")
    if start.base is not None:
        fill_base(start.base, model, mesh)
        reset_magnitudes(model)


def load_start(start: Start, folder: Path, engine: Engine, corpus: Corpus, mesh: Mesh, display: Display) -> TrainState:
    """Fills the engine, prints from where, and returns the state to continue with; `folder` is the run directory. A
    collective. Raises UserError."""
    fresh = TrainState(tokenizer=corpus.tokenizer.fingerprint, data=corpus.fingerprint)
    if start.base is not None and start.resumed is None:
        base, inside = start.base.resolve(), folder.resolve()
        fresh.base = str(base.relative_to(inside) if base.is_relative_to(inside) else base)
        fresh.base_fingerprint = mesh.agree(lambda: model_fingerprint(base), "init_from")
    if start.weights is not None:
        reader.load_weights(start.weights, engine, mesh)
        display.line(f"starting from the weights of {start.weights}")
        if start.weights == folder / BASE and start.base is None:
            mesh.agree(lambda: shutil.rmtree(folder / BASE) if mesh.is_main else None, "init_from")
    if start.resumed is not None:
        state = reader.load(start.resumed, engine, mesh)
        state.data, state.versions = fresh.data, fresh.versions
        display.line(f"resuming from {start.resumed} (step {state.step}, {state.tokens:,} tokens)")
    else:
        state = fresh
    for line in start.changes:
        display.warn(f"changed since then: {line}")
    return state


def _changes(checkpoint: Path, corpus: Corpus, config: Config) -> list[str]:
    """A line for each change since `checkpoint` was written. Raises UserError for those that rule out a resume."""
    then, now = read_state(checkpoint), TrainState().versions
    _check_tokenizer(then, corpus, checkpoint, "use the run's own tokenizer or another run_dir")
    lines = run_directory.check_resumable(checkpoint, config, (then.data, corpus.fingerprint))
    return lines + [f"{name}: {old} → {now[name]}" for name, old in then.versions.items() if now.get(name, old) != old]


def _model_changes(checkpoint: Path, corpus: Corpus, config: Config) -> list[str]:
    fix = "use the tokenizer of init_from or other weights"
    _check_tokenizer(read_state(checkpoint), corpus, checkpoint, fix)
    there: Config = read_config(checkpoint / CONFIG)
    changed = run_directory.model_differences(there, config)
    return [f"{key}: {old} → {new}" for key, (old, new) in changed.items()]


def _check_tokenizer(then: TrainState, corpus: Corpus, checkpoint: Path, fix: str) -> None:
    tokenizer = corpus.tokenizer.fingerprint
    if then.tokenizer != tokenizer:
        raise UserError(
            f"tokenizer fingerprint {tokenizer[:12]} differs from {then.tokenizer[:12]} in {checkpoint}: "
            f"the same ids would mean other text; {fix}"
        )


def _check_fit(start: Start, config: Config, model: nn.Module, mesh: Mesh) -> None:
    assert start.weights is not None
    unfit = reader.misfits(start.weights, model, mesh)
    if unfit:
        changes = "; ".join(start.changes) or "no key of model or router differs"
        raise UserError(
            f"init_from={config.init_from}: {len(unfit)} tensors don't fit this run ({changes}), "
            f"the first one: {unfit[0]}; set these keys as they are in {start.weights / CONFIG}"
        )
