"""Which back-end computes the experts: the one that `experts.backend` names, or with `auto` the fastest.

On CUDA a training run times what can run there, at its own shapes, before its first step (`measure`), and takes the
fastest for the whole process (`take`), after each has been compared with the plain loop in float32. Without a
measurement, as in generation, `auto` is torch's grouped_mm, or the loop where that can't run. On a CPU there is nothing
to choose.

Shapes: N rows sorted by expert, H hidden, F feed-forward, E experts that a rank holds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from moe.config import ExpertBackend, ExpertsConfig
from moe.errors import UserError
from moe.kernels import megablocks
from moe.kernels.grouped_swiglu import grouped_ffn, loop_ffn
from moe.kernels.policy import gemm_obstacle

FFN = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # x [N, H], counts [E], gate/up and down weights → [N, H]
ROUNDS, WARM_UP, REPEATED = 5, 2, 3  # of each candidate; the last: calls in each round
# ‖error‖ of the output and of each gradient, relative to float32's: each rounding to bfloat16 adds up to 2⁻⁹.
MOST_ERROR = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
CHECKED_COUNTS = [129, 0, 40]  # rows of the experts with which a candidate is checked
# Times as fast as the first candidate, so that two starts of a run rarely choose differently for a small difference.
LEAST_SPEEDUP = 1.05


class ExpertLoad(NamedTuple):
    """The work of a layer's experts on one rank."""

    hidden: int
    feed: int
    experts: int
    rows: int

    @property
    def counts(self) -> list[int]:
        """Rows of each expert: from half to one and a half times the mean, which training without collapse has."""
        shares = torch.linspace(0.5, 1.5, self.experts, dtype=torch.float64)
        ends = [round(self.rows * end) for end in (shares.cumsum(0) / shares.sum()).tolist()]
        return [end - start for start, end in pairwise([0, *ends])]


class BackendTimes(NamedTuple):
    """Milliseconds of a forward and a backward pass, and why other candidates were left out."""

    milliseconds: dict[ExpertBackend, float]
    left_out: dict[ExpertBackend, str]


class ExpertRoute(NamedTuple):
    backend: ExpertBackend
    reason: str


_Key = tuple[str, torch.dtype, tuple[int, int]]
_routes: dict[_Key, ExpertRoute] = {}  # what `take` chose for a device type, dtype and shapes


def resolve_backend(
    config: ExpertsConfig, device: torch.device, dtype: torch.dtype, shapes: tuple[int, int]
) -> tuple[ExpertBackend, str]:
    """The back-end that will run, and why, for the start-up log; `shapes` is (hidden_size, intermediate_size).

    Raises UserError with the reason when `experts.backend` names one that can't run here.
    """
    asked = config.backend
    if asked is not ExpertBackend.auto:
        _require(asked, device, dtype, shapes)
        if asked is not ExpertBackend.grouped_mm:
            return asked, "set by experts.backend"
    route = _routes.get((device.type, dtype, shapes))
    if asked is ExpertBackend.auto and route is not None and not config.fp8:
        return route
    obstacle = _grouped_mm_obstacle(device, dtype, shapes)
    if obstacle is not None:
        return ExpertBackend.loop, f"grouped_mm {obstacle}"
    on_cuda = device.type == "cuda"
    how = "not timed beside others" if on_cuda else "one product per expert, as torch's grouped_mm on CPU"
    return ExpertBackend.grouped_mm, "set by experts.backend" if on_cuda and asked is not ExpertBackend.auto else how


def is_unmeasured(config: ExpertsConfig, device: torch.device, dtype: torch.dtype, shapes: tuple[int, int]) -> bool:
    """Whether a measurement would decide `auto`, and this process hasn't made it. float8 factors are grouped_mm's."""
    known = (device.type, dtype, shapes) in _routes
    return config.backend is ExpertBackend.auto and not config.fp8 and device.type == "cuda" and not known


def take(times: Sequence[BackendTimes], device: torch.device, dtype: torch.dtype, load: ExpertLoad) -> None:
    """Makes `auto` the back-end that is fastest for the slowest rank, of those that can run on every rank; `times` are
    every rank's, so that all choose the same one. With none, `auto` stays what it is without a measurement."""
    common = [one for one in times[0].milliseconds if all(one in each.milliseconds for each in times)]
    slowest = {backend: max(each.milliseconds[backend] for each in times) for backend in common}
    left_out = {backend: reason for each in times for backend, reason in each.left_out.items()}
    if slowest:
        reason = describe(slowest, left_out, load)
        _routes[device.type, dtype, (load.hidden, load.feed)] = ExpertRoute(fastest(slowest), reason)


def describe(
    milliseconds: Mapping[ExpertBackend, float], left_out: Mapping[ExpertBackend, str], load: ExpertLoad
) -> str:
    """The measurement in one line, the fastest first."""
    order = sorted(milliseconds, key=lambda backend: milliseconds[backend])
    parts = [f"{backend.name} {milliseconds[backend]:.3g} ms" for backend in order]
    parts += [f"{backend.name} left out: {reason}" for backend, reason in left_out.items()]
    return f"{'; '.join(parts)}; forward and backward of {load.rows:,} rows on {load.experts} experts"


def fastest(milliseconds: Mapping[ExpertBackend, float]) -> ExpertBackend:
    """The first, unless another is at least `LEAST_SPEEDUP` times as fast."""
    first, best = next(iter(milliseconds)), min(milliseconds, key=lambda backend: milliseconds[backend])
    return best if milliseconds[first] >= LEAST_SPEEDUP * milliseconds[best] else first


def candidates(device: torch.device, dtype: torch.dtype, shapes: tuple[int, int]) -> dict[ExpertBackend, FFN]:
    """The back-ends that can run here, by preference at equal speed."""
    found = {}
    for backend in (ExpertBackend.grouped_mm, ExpertBackend.triton, ExpertBackend.megablocks, ExpertBackend.per_expert):
        try:
            _require(backend, device, dtype, shapes)
        except UserError:
            continue
        found[backend] = partial(grouped_ffn, backend=backend)
    return found


def measure(
    tried: Mapping[ExpertBackend, FFN],
    load: ExpertLoad,
    device: torch.device,
    dtype: torch.dtype,
    clock: Callable[[Callable[[], None]], float],
) -> BackendTimes:
    """Times a forward and a backward pass of each candidate that is right, in turns; `clock` gives a call's
    milliseconds. One that fails, or is wrong, is left out with the reason."""
    left_out, passes = dict[ExpertBackend, str](), dict[ExpertBackend, Callable[[], None]]()
    checked = load._replace(experts=len(CHECKED_COUNTS), rows=sum(CHECKED_COUNTS))
    small, real = (_Inputs(one, device, dtype, counts) for one, counts in ((checked, CHECKED_COUNTS), (load, None)))
    wanted = small.plain()
    for backend, function in tried.items():
        try:
            error = max(map(_relative_error, small.results(function), wanted))
            if not error <= MOST_ERROR[dtype]:
                left_out[backend] = f"its error is {error:.1e}"
                continue
            passes[backend] = _repeated(partial(real.results, function))
            passes[backend]()
        except Exception as error:  # of many types, from compilers, libraries and the driver
            left_out[backend] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            passes.pop(backend, None)
    for _ in range(WARM_UP):
        for action in passes.values():
            action()
    rounds = [{backend: clock(action) for backend, action in passes.items()} for _ in range(ROUNDS)]
    medians = {backend: statistics.median(each[backend] for each in rounds) / REPEATED for backend in passes}
    return BackendTimes(medians, left_out)


def event_milliseconds(action: Callable[[], None]) -> float:
    """A call's time on the current CUDA device, from an idle one."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    action()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


class _Inputs:
    """Random rows, weights and an output's gradient, of the size that they have in training."""

    def __init__(self, load: ExpertLoad, device: torch.device, dtype: torch.dtype, counts: list[int] | None) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            values = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std, generator=generator)
            return values.requires_grad_()

        hidden, feed, experts, rows = load
        self.counts = load.counts if counts is None else counts
        self.counts_E = torch.tensor(self.counts, device=device)
        self.leaves = [
            normal(rows, hidden),
            normal(experts, 2 * feed, hidden, std=hidden**-0.5),
            normal(experts, hidden, feed, std=feed**-0.5),
        ]
        self.gradient = normal(rows, hidden).detach()

    def results(self, function: FFN) -> list[Tensor]:
        """The output, and the gradients of rows and weights."""
        x_NH, gate_up, down = self.leaves
        y_NH = function(x_NH, self.counts_E, gate_up, down)
        return [y_NH.detach(), *torch.autograd.grad(y_NH, self.leaves, self.gradient)]

    def plain(self) -> list[Tensor]:
        """The same by the reference, in float32."""
        x_NH, gate_up, down = wide = [leaf.detach().float().requires_grad_() for leaf in self.leaves]
        y_NH = loop_ffn(x_NH, self.counts, gate_up, down)
        return [y_NH.detach(), *torch.autograd.grad(y_NH, wide, self.gradient.float())]


def _repeated(action: Callable[[], object]) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(REPEATED):
            action()

    return repeated


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def _require(backend: ExpertBackend, device: torch.device, dtype: torch.dtype, shapes: tuple[int, int]) -> None:
    """Raises UserError if this back-end can't run here."""
    if backend is ExpertBackend.megablocks:
        megablocks.require(device, dtype)
    elif backend is ExpertBackend.triton and (obstacle := gemm_obstacle(device, dtype)) is not None:
        raise UserError(f"experts.backend=triton can't run Triton's kernels here: {obstacle}; use experts.backend=auto")
    elif backend is ExpertBackend.grouped_mm and (obstacle := _grouped_mm_obstacle(device, dtype, shapes)) is not None:
        raise UserError(f"experts.backend=grouped_mm {obstacle}; use experts.backend=auto or loop")


def _grouped_mm_obstacle(device: torch.device, dtype: torch.dtype, shapes: tuple[int, int]) -> str | None:
    """Why grouped_mm can't run, or None if it can. On a CPU it always can."""
    if device.type != "cuda":
        return None
    if dtype is not torch.bfloat16:
        return f"must have bfloat16 rows on CUDA, not {str(dtype).removeprefix('torch.')}"
    if any(size * dtype.itemsize % 16 for size in shapes):
        return f"must have 16-byte aligned rows: hidden and intermediate size {shapes} must be multiples of 8"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "must have a GPU of compute capability 8.0 or newer"
    return None
