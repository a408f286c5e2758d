"""What collectives cost over the link between ranks, for `moe bench scale rate=…` under torchrun.

Hockney's law: a call in which each rank sends b bytes to others takes latency + b ÷ bandwidth seconds. The constants
are fitted, for each kind of collective, to calls of growing size; bandwidth ÷ the stated rate of the link is its
efficiency. The law of all-to-all has a third constant. gloo starts to send before it announces, over the same
connection, that it is ready to receive. So of two ranks the first may send only after the second has, but for what fits
into the queues on the way: the bytes of a call beyond `both_ways` count twice, though the link carries both directions.

The time of a step's collectives follows from the bytes that `moe.plan` knows: the exchange's from its calls by the law
of all-to-all; gradients' and weights', whose calls are few and large, as one call by that of all-reduce.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe.bench.results import Cell, ResultTable
from moe.config import Config
from moe.distributed.mesh import Mesh
from moe.errors import UserError
from moe.plan import exchange_bytes, plan_traffic

# Bytes that a rank sends to others in a call: 64, which cost no more than the latency, and 256 KiB to 4 MiB. A limited
# link lets single packets pass at once, so that the time of some KiB is neither that of the latency nor of the rate.
SIZES = (64, *(2**power for power in range(18, 23)))
CALLS = 2  # of a size in one round, after one that isn't timed, since a limited link lets some bytes pass at once
UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}


def parse_rate(text: str) -> float:
    """Bytes per second of a rate in tc's notation: `100mbit` is 12.5 million. Raises UserError."""
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", text)
    rate = float(matched[1]) * UNITS[matched[2]] / 8 if matched else 0.0
    if not rate:
        raise UserError(f"rate={text} must be the link's rate as launch/two_namespaces.sh takes it: rate=100mbit")
    return rate


@dataclass(frozen=True, slots=True)
class LinkLaw:
    """`latency` in seconds a call, `bandwidth` in bytes per second, `both_ways` in bytes: what a call sends beyond them
    is sent in one direction after the other."""

    latency: float
    bandwidth: float
    both_ways: float = math.inf

    def seconds(self, sent: float) -> float:
        """Of a call in which a rank sends `sent` bytes to others."""
        return self.latency + _in_turn(sent, self.both_ways) / self.bandwidth


def _in_turn(sent: float, both_ways: float) -> float:
    return sent + max(0.0, sent - both_ways)


def fit_link(seconds: Mapping[int, float], *, in_turn: bool) -> LinkLaw:
    """The law of {bytes of a call: its seconds}, with the least sum of squares of *relative* errors, since the shortest
    calls take a thousandth of the longest; a latency below 0 becomes 0. `in_turn`: fit `both_ways` too, else it is
    infinite. Raises ValueError for fewer sizes than one more than constants, UserError where time doesn't grow."""
    constants = 3 if in_turn else 2
    if len(seconds) <= constants:
        raise ValueError(
            f"a law with {constants} constants needs {constants + 1} sizes of calls or more, not {len(seconds)}"
        )
    largest = max(seconds)
    tried = [math.inf, *(largest * 2 ** (-step / 16) for step in range(1, 160))] if in_turn else [math.inf]
    laws = [_fit(seconds, both_ways) for both_ways in tried]
    return min(laws, key=lambda law: sum((law.seconds(size) / each - 1) ** 2 for size, each in seconds.items()))


def _fit(seconds: Mapping[int, float], both_ways: float) -> LinkLaw:
    # latency · (1 ÷ seconds) + cost · (bytes ÷ seconds) = 1, by least squares
    per_call = [1 / each for each in seconds.values()]
    per_byte = [_in_turn(size, both_ways) / each for size, each in seconds.items()]
    cc, cb, bb = _dot(per_call, per_call), _dot(per_call, per_byte), _dot(per_byte, per_byte)
    latency = max(0.0, (sum(per_call) * bb - sum(per_byte) * cb) / (cc * bb - cb * cb))
    cost = (sum(per_byte) - latency * cb) / bb
    if cost <= 0:
        raise UserError("calls of more bytes took no longer: the machine is busy, or the link isn't what limits them")
    return LinkLaw(latency, 1 / cost, both_ways)


def _dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _all_to_all(sent: int, mesh: Mesh) -> Callable[[], object]:
    """A call in which each rank sends `sent` bytes, in equal parts, to the others, as the exchange of rows does."""
    of_R = [0 if rank == mesh.rank else sent // (mesh.world_size - 1) for rank in range(mesh.world_size)]
    rows, received = (torch.zeros(sum(of_R), dtype=torch.uint8, device=mesh.device) for _ in range(2))
    return lambda: dist.all_to_all_single(received, rows, of_R, of_R)


def _all_reduce(sent: int, mesh: Mesh) -> Callable[[], object]:
    """A call in which each rank of a ring sends `sent` bytes."""
    numbers = sent * mesh.world_size // (2 * (mesh.world_size - 1)) // 4
    gradients = torch.zeros(numbers, device=mesh.device)
    return lambda: dist.all_reduce(gradients)


COLLECTIVES = {"all-to-all": _all_to_all, "all-reduce": _all_reduce}


def measure_calls(rounds: int, mesh: Mesh) -> dict[str, dict[int, list[float]]]:
    """{collective: {bytes that a rank sends: seconds of one call, for each round}}. A collective."""
    calls = {(name, size): make(size, mesh) for name, make in COLLECTIVES.items() for size in SIZES}
    times: dict[str, dict[int, list[float]]] = {name: {size: [] for size in SIZES} for name in COLLECTIVES}
    for index in range(rounds + 1):
        for name, size in list(calls)[:: -1 if index % 2 else 1]:
            mesh.barrier()
            calls[name, size]()
            start = time.perf_counter()
            for _ in range(CALLS):
                calls[name, size]()
            if mesh.device.type == "cuda":
                torch.cuda.synchronize(mesh.device)
            if index:  # the first round warms up
                times[name][size].append((time.perf_counter() - start) / CALLS)
    return times


class LinkLaws:
    """The laws fitted to the medians of `measure_calls`."""

    def __init__(self, times: Mapping[str, Mapping[int, list[float]]]) -> None:
        self.medians = {name: {n: statistics.median(each) for n, each in of.items()} for name, of in times.items()}
        self.all_to_all = fit_link(self.medians["all-to-all"], in_turn=True)
        self.all_reduce = fit_link(self.medians["all-reduce"], in_turn=False)

    def planned_seconds(self, config: Config, world_size: int) -> float:
        """Of a step's collectives, one after the other, if all of them use the same link."""
        exchange, flows = exchange_bytes(config, world_size), plan_traffic(config, 1, world_size)
        seconds = self.all_reduce.seconds(sum(flow.total for name, flow in flows.items() if name != "expert exchange"))
        for calls, passed in ((exchange.row_calls, exchange.rows), (exchange.count_calls, exchange.counts)):
            if calls:
                seconds += calls * self.all_to_all.seconds(passed * exchange.leaving / calls)
        return seconds

    def table(self) -> ResultTable:
        """How far the laws are off, call by call."""
        rows: list[list[Cell]] = []
        for (name, medians), law in zip(self.medians.items(), (self.all_to_all, self.all_reduce), strict=True):
            for size, measured in medians.items():
                said = law.seconds(size)
                rows.append([name, size, measured * 1e3, said * 1e3, said / measured])
        return ResultTable(["one call", "bytes a rank to others", "ms", "ms by the law", "law ÷ measured"], rows)

    def notes(self, rate: float) -> list[str]:
        """The constants, beside the link's stated rate in bytes per second."""
        lines = list[str]()
        for name, law in (("all-to-all", self.all_to_all), ("all-reduce", self.all_reduce)):
            beyond = "" if law.both_ways == math.inf else f", bytes beyond {law.both_ways / 1e6:.2g} MB counted twice"
            lines.append(
                f"one {name}: {law.latency * 1e3:.2g} ms + bytes ÷ {law.bandwidth / 1e6:.4g} MB/s{beyond}; "
                f"the link's stated rate is {rate / 1e6:.4g} MB/s"
            )
        return lines
