"""A checkpoint continues exactly: at the same mesh bitwise, at another one to rounding."""

from __future__ import annotations

import resource
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from safetensors import safe_open
from torch import Tensor, nn

from moe.checkpoint import writer as save_module
from moe.checkpoint.layout import committed
from moe.checkpoint.manifest import verify
from moe.checkpoint.reader import load, load_model, newest, resolve
from moe.checkpoint.state import TrainState
from moe.checkpoint.writer import Saver
from moe.config import CheckpointConfig
from moe.config.compose import to_yaml
from moe.engine.base import MOMENTS
from moe.engine.deepspeed import optimizer_state as optimizer_state_module
from moe.engine.deepspeed.optimizer_state import ZeroOptimizerState
from moe.errors import UserError
from moe.model import build as build_module
from moe.model.transformer import Transformer
from tests.distributed.training import build, config_of, engine_steps
from tests.ranks import run_ranks

BEFORE, AFTER = 3, 3


def _freeze(model: Transformer, endings: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(endings))


def _save_and_go_on(folder: Path, overrides: list[str], frozen: tuple[str, ...] = ()) -> list[float]:
    config = config_of(overrides)
    mesh, engine = build(config, change=partial(_freeze, endings=frozen))
    engine_steps(config, mesh, engine, 0, BEFORE)
    state = TrainState(step=BEFORE, consumed=BEFORE * 8, tokens=BEFORE * 128, tokenizer="t", data="d")
    saver = Saver(folder, mesh, CheckpointConfig(), print, print)
    saver.save(engine, state, to_yaml(config))
    losses = engine_steps(config, mesh, engine, BEFORE, AFTER).losses
    assert saver.wait()
    return losses


def _resume(folder: Path, overrides: list[str], frozen: tuple[str, ...] = ()) -> tuple[list[float], TrainState]:
    config = config_of(
        [*overrides, "train.seed=7"] if frozen else overrides
    )  # weights that a load leaves out are noticed
    mesh, engine = build(config, change=partial(_freeze, endings=frozen))
    checkpoint = newest(folder, mesh, print)
    assert checkpoint is not None
    state = load(checkpoint, engine, mesh)
    return engine_steps(config, mesh, engine, state.step, AFTER).losses, state


def _at(world: tuple[int, ...], more: list[str]) -> list[str]:
    return [f"parallel.expert_parallel_size={world[1]}", f"parallel.zero_stage={world[2]}", *more]


def _saved_and_resumed(
    folder: Path,
    saved: tuple[int, ...],
    resumed: tuple[int, ...],
    more: list[str],
    tolerance: float,
    frozen: tuple[str, ...] = (),
) -> list[TrainState]:
    """The states that the ranks of `resumed` found, after the losses that followed were those of `saved`."""
    expected = run_ranks(saved[0], _save_and_go_on, folder, _at(saved, more), frozen)[0]
    results = run_ranks(resumed[0], _resume, folder, _at(resumed, more), frozen)
    for losses, _ in results:
        assert losses == (expected if tolerance == 0 else pytest.approx(expected, rel=tolerance))
    return [state for _, state in results]


def _saved_moments(run: Path) -> tuple[Path, set[str]]:
    """A run's only checkpoint, and the names of the moments in it."""
    (folder,) = committed(run / "checkpoints")
    moments: set[str] = set()
    for path in (folder / "optimizer").iterdir():
        with safe_open(path, "pt") as file:
            moments.update(file.keys())
    return folder, moments


CASES = [
    # (ranks, expert-parallel size, ZeRO stage) that saved → that resumes, and the tolerance
    ((1, 1, 1), (1, 1, 1), 0.0),
    ((2, 2, 1), (2, 2, 1), 0.0),
    ((2, 1, 2), (2, 1, 2), 0.0),
    ((2, 2, 1), (1, 1, 2), 1e-6),
    ((1, 1, 1), (2, 2, 2), 1e-6),
    ((2, 1, 1), (2, 2, 1), 1e-6),
]


@pytest.mark.fault(9)
@pytest.mark.parametrize(("saved", "resumed", "tolerance"), CASES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resume_is_exact(
    saved: tuple[int, ...], resumed: tuple[int, ...], tolerance: float, precision: str, tmp_path: Path
) -> None:
    if precision == "bfloat16" and saved != resumed:
        tolerance = 5e-3  # activations have 8 bits: another order of sums shows there

    for state in _saved_and_resumed(tmp_path, saved, resumed, [f"train.precision={precision}"], tolerance):
        assert (state.step, state.consumed, state.tokens) == (BEFORE, BEFORE * 8, BEFORE * 128)


MUON_CASES = [
    # (ranks, expert-parallel size, ZeRO stage) that saved → that resumes, precision, tolerance
    ((1, 1, 1), (1, 1, 1), "float32", 0.0),
    ((2, 2, 1), (2, 2, 1), "bfloat16", 0.0),
    ((2, 1, 2), (2, 1, 2), "float32", 0.0),
    ((2, 2, 1), (1, 1, 2), "float32", 1e-6),
    ((1, 1, 1), (2, 2, 2), "float32", 1e-6),
    ((2, 1, 1), (2, 2, 1), "bfloat16", 5e-3),
]


@pytest.mark.parametrize(("saved", "resumed", "precision", "tolerance"), MUON_CASES)
def test_muon_resumes_exactly(
    saved: tuple[int, ...], resumed: tuple[int, ...], precision: str, tolerance: float, tmp_path: Path
) -> None:
    more = [f"train.precision={precision}", "optim=muon"]
    _saved_and_resumed(tmp_path, saved, resumed, more, tolerance)
    folder, moments = _saved_moments(tmp_path)
    for name, _ in load_model(folder).named_parameters():
        by_muon = "_proj" in name
        kinds = ("momentum_buffer",) if by_muon else ("exp_avg", "exp_avg_sq")
        assert {kind for kind in MOMENTS if f"{kind}.{name}" in moments} == set(kinds), name


FROZEN_CASES = [
    # (ranks, expert-parallel size, ZeRO stage) that saved → that resumes, precision, tolerance, what is frozen
    ((2, 2, 1), (2, 2, 1), "float32", 0.0, ("mlp.gate.weight",)),
    ((2, 2, 2), (2, 2, 2), "bfloat16", 0.0, ("mlp.gate.weight",)),
    ((2, 1, 2), (2, 1, 2), "float32", 0.0, ("mlp.gate.weight",)),
    ((1, 1, 1), (1, 1, 1), "bfloat16", 0.0, ("mlp.gate.weight",)),
    ((2, 2, 2), (1, 1, 1), "float32", 1e-6, ("mlp.gate.weight",)),
    ((2, 2, 1), (2, 1, 2), "bfloat16", 5e-3, ("mlp.gate.weight",)),
    # Attention and the head alone train, as with adapters: DeepSpeed has no norm and no expert then.
    ((2, 2, 1), (2, 2, 1), "float32", 0.0, ("gate.weight", "norm.weight", "_proj", "embed_tokens.weight")),
    ((2, 2, 2), (1, 1, 1), "float32", 1e-6, ("gate.weight", "norm.weight", "_proj", "embed_tokens.weight")),
    ((2, 2, 2), (2, 2, 2), "bfloat16", 0.0, ("gate.weight", "norm.weight", "_proj", "embed_tokens.weight")),
    # Experts alone train.
    ((2, 2, 1), (2, 2, 1), "float32", 0.0, (".weight",)),
]


@pytest.mark.parametrize(("saved", "resumed", "precision", "tolerance", "frozen"), FROZEN_CASES)
def test_parameters_that_do_not_train_are_saved_without_moments(
    saved: tuple[int, ...],
    resumed: tuple[int, ...],
    precision: str,
    tolerance: float,
    frozen: tuple[str, ...],
    tmp_path: Path,
) -> None:
    more = [f"train.precision={precision}"]
    _saved_and_resumed(tmp_path, saved, resumed, more, tolerance, frozen)
    folder, moments = _saved_moments(tmp_path)
    config = config_of(_at(saved, more))
    start = Transformer(config.model, config.router, config.experts)
    start.init_weights(config.train.seed)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    for name, parameter in load_model(folder).named_parameters():
        before = start.get_parameter(name).detach().to(dtype).float()
        trains = not name.endswith(frozen)
        assert torch.equal(parameter, before) == (not trains), name
        assert (f"exp_avg.{name}" in moments) == (f"exp_avg_sq.{name}" in moments) == trains, name


def test_layout_has_no_pickle_and_loads_as_a_whole_model(tmp_path: Path) -> None:
    run_ranks(2, _save_and_go_on, tmp_path, ["parallel.expert_parallel_size=2"])
    (folder,) = committed(tmp_path / "checkpoints")
    names = {path.relative_to(folder).parts[0] for path in folder.rglob("*")}
    assert names == {"model", "optimizer", "state.json", "config.yaml", "manifest.json"}
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".json", ".yaml", ".safetensors"}
    assert resolve(tmp_path) == folder
    model = load_model(folder)
    assert model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").shape[0] == 4
    losses, _ = run_ranks(1, _resume, tmp_path, [])[0]
    assert losses[0] > 0


def _add_buffers(model: Transformer) -> None:
    """A stateful router's: a bias and counts in each layer, a scalar, and one that no checkpoint holds."""
    for index, layer in enumerate(model.model.layers):
        layer.register_buffer("bias", torch.full((4,), 1 / 3) + index)
        layer.register_buffer("counts", torch.arange(4) + 2**40 * index)
        layer.register_buffer("scratch", torch.zeros(2), persistent=False)
    model.register_buffer("seen", torch.tensor(7))


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def _move_buffers_and_save(folder: Path, overrides: list[str]) -> dict[str, Tensor]:
    """Saves, then moves the buffers on while the save is under way; what they were when it began."""
    config = config_of(overrides)
    mesh, engine = build(config, change=_add_buffers)
    engine_steps(config, mesh, engine, 0, 1)
    for buffer in engine.model.buffers():
        buffer.add_(1)
    then = _buffers(engine.model)
    saver = Saver(folder, mesh, CheckpointConfig(), print, print)
    saver.save(engine, TrainState(step=1), to_yaml(config))
    for buffer in engine.model.buffers():
        buffer.add_(1)
    assert saver.wait()
    return then


def _resumed_buffers(folder: Path, overrides: list[str]) -> dict[str, Tensor]:
    mesh, engine = build(config_of(overrides), change=_add_buffers)
    checkpoint = newest(folder, mesh, print)
    assert checkpoint is not None
    load(checkpoint, engine, mesh)
    return _buffers(engine.model)


class _WithBuffers(Transformer):
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        _add_buffers(self)
        for module in self.modules():
            if any(True for _ in module.buffers(recurse=False)):
                module.reset_buffers = lambda: None  # type: ignore[assignment]  # each is read


@pytest.mark.parametrize(("saved", "resumed"), [((2, 2), (1, 1)), ((1, 1), (2, 2)), ((2, 1), (2, 2))])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_buffers_are_saved_like_weights(
    saved: tuple[int, int],
    resumed: tuple[int, int],
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def overrides(world: tuple[int, int]) -> list[str]:
        return [f"parallel.expert_parallel_size={world[1]}", f"train.precision={precision}"]

    expected, *_ = run_ranks(saved[0], _move_buffers_and_save, tmp_path, overrides(saved))
    assert {tensor.dtype for tensor in expected.values()} == {torch.float32, torch.int64}
    persistent = expected.keys() - {f"model.layers.{layer}.scratch" for layer in range(2)}
    for found in run_ranks(resumed[0], _resumed_buffers, tmp_path, overrides(resumed)):
        assert found.keys() == expected.keys()
        for name in found:
            assert torch.equal(found[name], expected[name]) == (name in persistent), name
            assert found[name].dtype == expected[name].dtype
    (folder,) = committed(tmp_path / "checkpoints")
    times: Counter[str] = Counter()
    for path in (folder / "model").iterdir():
        with safe_open(path, "pt") as file:
            times.update(file.keys())
    assert {name: times[name] for name in expected} == {name: int(name in persistent) for name in expected}
    monkeypatch.setattr(build_module, "Transformer", _WithBuffers)
    whole = _buffers(load_model(folder))
    assert all(torch.equal(whole[name], expected[name]) for name in persistent)


def _resume_with_other_buffers(folder: Path) -> str:
    def change(model: Transformer) -> None:
        _add_buffers(model)
        model.model.layers[1].counts = torch.zeros(4)  # float32, where the file has int64

    mesh, engine = build(config_of([]), change=change)
    checkpoint = newest(folder, mesh, print)
    assert checkpoint is not None
    with pytest.raises(UserError) as refused:
        load(checkpoint, engine, mesh)
    return str(refused.value)


def test_a_buffer_of_another_dtype_is_refused(tmp_path: Path) -> None:
    run_ranks(1, _move_buffers_and_save, tmp_path, [])
    (message,) = run_ranks(1, _resume_with_other_buffers, tmp_path)
    assert "model.layers.1.counts is torch.int64, the model's is torch.float32" in message


def _save_twice_the_second_into_a_full_disk(folder: Path) -> list[str]:
    config = config_of([])
    mesh, engine = build(config)
    warnings: list[str] = []
    saver = Saver(folder, mesh, CheckpointConfig(), print, warnings.append)
    engine_steps(config, mesh, engine, 0, 1)
    saver.save(engine, TrainState(step=1), to_yaml(config))
    assert saver.wait()
    engine_steps(config, mesh, engine, 1, 1)
    # A limit on file size fails a write just as a full disk does (EFBIG for ENOSPC), without root's rights.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    for failures in (1, 2):
        saver.save(engine, TrainState(step=2), to_yaml(config))
        assert not saver.wait()
        assert saver.failures == failures
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    saver.save(engine, TrainState(step=3), to_yaml(config))
    assert saver.wait()
    assert saver.failures == 0
    return warnings


@pytest.mark.fault(4)
def test_a_failed_save_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    for warnings in run_ranks(2, _save_twice_the_second_into_a_full_disk, tmp_path):
        assert len(warnings) == 2
        assert "step_00000002: not saved" in warnings[0]
        assert "MB are free" in warnings[0]
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000001", "step_00000003"]
    assert [verify(path) for path in committed(folder)] == [None, None]


def _save_to_a_slow_disk(folder: Path) -> list[str]:
    config = config_of([])
    mesh, engine = build(config)
    engine_steps(config, mesh, engine, 0, 1)
    real = save_module.fsync

    def slow(path: Path) -> None:
        time.sleep(1.2 if path.suffix == ".safetensors" else 0)
        real(path)

    save_module.fsync = slow
    beats: list[str] = []
    saver = Saver(folder, mesh, CheckpointConfig(), print, print, beats.append)
    saver.save(engine, TrainState(step=1), to_yaml(config))
    assert saver.wait()
    return beats


def test_who_waits_for_a_slow_disk_is_told_that_the_save_goes_on(tmp_path: Path) -> None:
    beats = run_ranks(1, _save_to_a_slow_disk, tmp_path)[0]
    assert [beat.partition("/")[0] for beat in beats[:2]] == ["the save, hashing model", "the save, hashing optimizer"]


def _forget(what: str) -> None:
    """Leaves one step of a load out, in this process."""
    zero_kinds: list[Any] = [DeepSpeedZeroOptimizer, BF16_Optimizer]
    if what == "update_lp_params":
        for kind in zero_kinds:
            kind.update_lp_params = lambda self: None
        return
    link = ZeroOptimizerState._link_moments

    def changed(self: ZeroOptimizerState, adam_steps: int | None = None) -> None:
        link(self, 0 if what == "Adam's step" and adam_steps is not None else adam_steps)
        if what == "the step in every group" and adam_steps is not None:
            optimizer = self._zero.optimizer
            for group in optimizer.param_groups[1:]:
                for parameter in group["params"]:
                    optimizer.state[parameter]["step"].zero_()

    if what == "the moments":
        optimizer_state_module.safe_set_full_optimizer_state = lambda *_: None
    ZeroOptimizerState._link_moments = changed  # type: ignore[method-assign]


def _resume_without(what: str, folder: Path, overrides: list[str]) -> list[float]:
    _forget(what)
    return _resume(folder, overrides)[0]


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["update_lp_params", "Adam's step", "the step in every group", "the moments"])
def test_each_omission_would_be_seen(what: str, precision: str, tmp_path: Path) -> None:
    """A load that leaves this out raises nothing, and trains on from other numbers: the bitwise test above sees it."""
    overrides = ["parallel.expert_parallel_size=2", f"train.precision={precision}"]
    expected = run_ranks(2, _save_and_go_on, tmp_path, overrides)[0]
    losses = run_ranks(2, _resume_without, what, tmp_path, overrides)[0]
    gap = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
    assert gap > 1e-4
