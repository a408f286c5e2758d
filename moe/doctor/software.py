"""Packages, torch's build, back-ends, W&B, and one real training step with each engine."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from moe.config import AttentionBackend, ExpertBackend, ExpertsConfig
from moe.doctor.finding import Finding
from moe.errors import UserError

HEAD, SHAPES = 128, (4096, 14336)  # Mixtral 8x7B's


def packages() -> list[Finding]:
    """Python and the packages that this one requires, against their installed versions."""
    from packaging.requirements import Requirement

    found = [Finding("Python", "ok", f"{sys.version.split()[0]}, {sys.executable}")]
    try:
        needed = [Requirement(text) for text in requires("moe-train") or []]
    except PackageNotFoundError:
        return [*found, Finding("packages", "note", "moe runs from its source, it isn't installed", "pip install -e .")]
    wrong, right = [], [f"moe-train {version('moe-train')}"]
    for one in needed:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(one.name)
        except PackageNotFoundError:
            wrong.append(f"{one.name} is missing")
            continue
        if one.specifier.contains(installed, prereleases=True):
            right.append(f"{one.name} {installed}")
        else:
            wrong.append(f"{one.name} {installed} must be {one.specifier}")
    found.append(Finding("packages", "ok", ", ".join(right)))
    if wrong:
        found.append(Finding("packages", "fail", "; ".join(wrong), "pip install -e ."))
    return found


def torch_build() -> list[Finding]:
    import torch

    text = f"torch {torch.__version__}"
    if torch.version.cuda is None:
        return [Finding("torch", "ok", f"{text}, a CPU build: ranks communicate over gloo")]
    if not torch.cuda.is_available():
        return [
            Finding(
                "torch",
                "note",
                f"{text} for CUDA {torch.version.cuda}, but no usable GPU or driver",
                "nvidia-smi says more",
            )
        ]
    from torch.cuda import nccl

    driver = getattr(torch._C, "_cuda_getDriverVersion")()  # noqa: B009  # its only name, and not in torch's stubs
    versions = f"driver for CUDA {driver // 1000}.{driver % 1000 // 10}, NCCL {'.'.join(map(str, nccl.version()))}"
    found = [Finding("torch", "ok", f"{text}, CUDA {torch.version.cuda}, {versions}")]
    for index in range(torch.cuda.device_count()):
        name, (free, total) = torch.cuda.get_device_name(index), torch.cuda.mem_get_info(index)
        state = "ok" if free > 0.9 * total else "note"
        fix = "" if state == "ok" else "another process uses this GPU: nvidia-smi names it"
        found.append(Finding(f"GPU {index}", state, f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free", fix))
    return found


def backends() -> list[Finding]:
    """What `auto` takes on this machine, and why each of the others can't run."""
    import torch

    from moe.kernels.attention import resolve_attention
    from moe.kernels.expert_backends import resolve_backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def attention(backend: AttentionBackend) -> tuple[Any, str]:
        return resolve_attention(backend, device, dtype, HEAD)

    def experts(backend: ExpertBackend) -> tuple[Any, str]:
        return resolve_backend(ExpertsConfig(backend=backend), device, dtype, SHAPES)

    return [
        Finding("attention", "ok", _resolved(attention, AttentionBackend)),
        Finding("experts", "ok", _resolved(experts, ExpertBackend)),
    ]


def _resolved(resolve: Any, kinds: Any) -> str:
    chosen, reason = resolve(kinds.auto)
    parts = [f"auto takes {chosen.name} ({reason})"]
    for kind in kinds:
        if kind not in (kinds.auto, chosen):
            try:
                resolve(kind)
                parts.append(f"{kind.name} runs")
            except UserError as error:
                parts.append(str(error))
    return "; ".join(parts)


def tracking() -> list[Finding]:
    from moe.train.wandb_key import find_key

    mode = os.environ.get("WANDB_MODE")
    if mode:
        return [Finding("W&B", "ok", f"wandb {version('wandb')}, WANDB_MODE={mode}")]
    key, wrong = find_key()
    if wrong:
        return [Finding("W&B", "note", f"wandb {version('wandb')}: {'; '.join(wrong.values())}", "mend it or unset it")]
    if key:
        return [Finding("W&B", "ok", f"wandb {version('wandb')}, an API key is there: runs are online")]
    fix = "`wandb login`, or upload later with `wandb sync RUN_DIR/wandb/offline-run-*`"
    return [Finding("W&B", "note", f"wandb {version('wandb')}, no API key: runs are recorded offline", fix)]


def start_training() -> subprocess.Popen[str]:
    """A process that takes two steps of a tiny model with each engine."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("RANK", "WORLD_", "LOCAL_", "MASTER_"))
    }
    return subprocess.Popen(
        [sys.executable, "-m", "moe.doctor.step"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish_training(process: subprocess.Popen[str], seconds: float) -> list[Finding]:
    """Waits at most `seconds` for the process of `start_training`."""
    try:
        out, err = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        found = f"two steps of a tiny model were not done after {seconds:.0f} s"
        return [Finding("training", "note", found, "the machine is busy, or loads slowly: try again")]
    done = [line.removeprefix("done: ") for line in out.splitlines() if line.startswith("done: ")]
    if process.returncode == 0 and len(done) == 2:
        found = f"two steps with {' and '.join(done)}, equal losses; DeepSpeed's insides are as expected"
        return [Finding("training", "ok", found)]
    last = (err.strip().splitlines() or ["no output"])[-1]
    return [Finding("training", "fail", f"exit code {process.returncode} after {', '.join(done) or 'nothing'}: {last}")]
