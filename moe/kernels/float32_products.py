"""Which library computes float32 matrix products on a CPU: MKL, torch's own choice, or oneDNN, chosen by measurement.

MKL runs float32 products at about half of some AMD cores' speed; oneDNN reaches all of it, with the same accuracy. On
other cores both are as fast. torch hands a product to oneDNN where `torch.backends.mkldnn.matmul.fp32_precision` is
`bf16`, which allows oneDNN to round the factors to bfloat16: it does so on cores with AMX units and nowhere else. So
`choose` measures both libraries' errors and speeds, and takes oneDNN only where it is as accurate and much faster.

The switch holds for the whole process and would double the time of SDPA, so `float32_products` sets it for single
functions: the experts, linear layers, the language-model head. Other products are MKL's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

SHAPE = 128, 512, 512  # rows, length of a dot product, columns: well under a time slice
ROUNDS = 20
MOST_ERROR = 4.0  # oneDNN's largest error over MKL's: its order of summation is another, a bfloat16 factor gives 4,000
# oneDNN's speed over MKL's. It was 1.0 to 1.2 on Intel and on one kind of AMD core, 2.1 to 2.5 on another: the limit is
# far from both, since a run that resumes must choose what it chose before, on a busy machine too.
LEAST_GAIN = 1.5


@dataclass(frozen=True, slots=True)
class Route:
    """The library that computes float32 products, and why, for the start-up log."""

    onednn: bool
    reason: str

    def __str__(self) -> str:
        return f"float32 matrix products: {'oneDNN' if self.onednn else 'MKL'} ({self.reason})"


@dataclass(frozen=True, slots=True)
class LibraryTimes:
    """Largest error of a product, relative to its largest element, and seconds, of one library."""

    error: float
    seconds: float


_UNMEASURED = Route(False, "not measured")
_route = _UNMEASURED


def choose() -> Route:
    """Measures both libraries, once in a process and on one thread, and uses the better one from now on. Takes some
    30 ms."""
    global _route
    if _route is _UNMEASURED:
        with one_thread():
            _route = _measured_route()
    return _route


@contextmanager
def one_thread() -> Iterator[None]:
    """For a measurement: several threads wait for each other where another process has a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def uses_onednn() -> bool:
    """Whether `choose` took oneDNN."""
    return _route.onednn


def float32_products(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a forward or backward pass without attention: its float32 products go to the chosen library."""

    @wraps(function)
    def switched(*args: P.args, **kwargs: P.kwargs) -> R:
        with forced_onednn() if _route.onednn else nullcontext():
            return function(*args, **kwargs)

    return switched


@contextmanager
def forced_onednn() -> Iterator[None]:
    """Sends float32 products to oneDNN, whatever `choose` took."""
    switch: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


def _measured_route() -> Route:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return Route(False, "torch has one library")  # whichever it is, torch itself chooses it
    generator = torch.Generator().manual_seed(0)
    rows, inner, columns = SHAPE
    a = torch.randn(rows, inner, generator=generator)
    b = torch.randn(columns, inner, generator=generator).t()  # as a weight in a linear layer
    exact = a.double() @ b.double()
    contexts: list[Callable[[], AbstractContextManager[None]]] = [nullcontext, forced_onednn]
    products = [_product(a, b, context) for context in contexts]
    if torch.equal(*products):
        return Route(False, "torch hands oneDNN no float32 products on this CPU")  # it has no AVX-512
    errors = [largest_error(product, exact) for product in products]
    if errors[1] > MOST_ERROR * errors[0]:
        return decide(LibraryTimes(errors[0], 0.0), LibraryTimes(errors[1], 0.0))
    times = [[_seconds(a, b, context) for context in contexts] for _ in range(ROUNDS)]
    mkl, onednn = (LibraryTimes(error, min(each)) for error, each in zip(errors, zip(*times, strict=True), strict=True))
    return decide(mkl, onednn)


def decide(mkl: LibraryTimes, onednn: LibraryTimes) -> Route:
    """oneDNN if it is as accurate as MKL and at least `LEAST_GAIN` times as fast."""
    if onednn.error > MOST_ERROR * mkl.error:
        return Route(False, f"oneDNN's error is {onednn.error:.0e} of the largest result, MKL's {mkl.error:.0e}")
    gain = mkl.seconds / onednn.seconds
    if gain < LEAST_GAIN:
        return Route(False, f"oneDNN is {gain:.1f} × as fast, less than {LEAST_GAIN}")
    return Route(True, f"{gain:.1f} × as fast as MKL, error {onednn.error:.0e} of the largest result")


def _product(a: Tensor, b: Tensor, context: Callable[[], AbstractContextManager[None]]) -> Tensor:
    with context():
        return a @ b


def largest_error(product: Tensor, exact: Tensor) -> float:
    """The largest difference from `exact` (float64), relative to its largest element."""
    return float((product - exact).abs().max() / exact.abs().max())


def _seconds(a: Tensor, b: Tensor, context: Callable[[], AbstractContextManager[None]]) -> float:
    with context():
        return product_seconds(a, b)


def product_seconds(a: Tensor, b: Tensor) -> float:
    """CPU time of a · b: on a busy machine wall-clock would say who else ran, and two runs of one configuration would
    choose differently."""
    start = time.thread_time()
    torch.mm(a, b)
    return time.thread_time() - start
