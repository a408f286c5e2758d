"""Collectives over all ranks: sums, small values from every rank, and agreement on failures."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from moe.errors import OtherRankFailed, UserError, is_device_fault, line_about

T = TypeVar("T")
PROGRAM, MACHINE, USER = range(3)  # whose fault an action's failure is; where ranks differ, the first counts


class Collectives:
    """With one process nothing is sent. Every method but `is_main` is a collective."""

    __slots__ = ()
    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """In-place sum over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, by rank, on every rank. For small things: they are pickled."""
        values: list[T] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def from_main(self, value: T) -> T:
        """Rank 0's `value`, on every rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def agree(self, action: Callable[[], T], what: str, group: dist.ProcessGroup | None = None) -> T:
        """Run `action` on every rank; if it failed on any, every rank raises the first failure's one line.

        `group` holds all ranks too, for a thread that must not meet training's collectives.

        Without this, a rank that alone meets a bad file would leave the others waiting in the next collective.
        Raises UserError, or OSError, on every rank for one on any. A fault of the program is raised as it is on its own
        rank, and as OtherRankFailed on the others.
        """
        result: T | None = None
        failure: tuple[int, str, bool] | None = None  # (whose fault, its one line, whether a device broke)
        cause: Exception | None = None
        try:
            result = action()
        except UserError as error:
            broken = is_device_fault(error)
            cause, failure = error, (MACHINE if broken else USER, str(error), broken)
        except OSError as error:
            cause, failure = error, (MACHINE, f"{what}: {line_about(error)}", is_device_fault(error))
        except Exception as error:
            cause, failure = error, (PROGRAM, f"{what}: {type(error).__name__}: {error}", False)
        failures = [failure]
        if self.world_size > 1:
            failures = [None] * self.world_size
            dist.all_gather_object(failures, failure, group=group)
        if failure is not None and failure[0] == PROGRAM:
            assert cause is not None
            raise cause
        found = [(rank, *one) for rank, one in enumerate(failures) if one is not None]
        broken = any(device for *_, device in found)
        for rank, fault, text, _ in sorted(found, key=lambda one: one[1]):
            if fault == PROGRAM:
                raise OtherRankFailed(f"rank {rank} failed: {text} (its own output has the traceback)") from cause
            line = text if rank == 0 else f"{text} (on rank {rank})"
            if broken and not is_device_fault(cause):  # the exit code is the same on every rank
                cause = OSError(errno.EIO, text)
            raise (OSError if fault == MACHINE else UserError)(line) from cause
        return result  # type: ignore[return-value]  # no rank failed, so this one has a result
