"""One-line errors for a command that meets the limits of the machine or of the shell (`ulimit`)."""

from __future__ import annotations

import resource
import traceback
from pathlib import Path

from moe.config import EngineKind
from moe.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
# Measured peaks: 27 in one process with W&B; 40, 53 and 61 in each of 2, 4 and 6 ranks that share experts in pairs.
OPEN_FILES, OPEN_FILES_PER_RANK = 32, 6
# What torch, the thread library and the loader of shared libraries write when there is no memory.
NO_MEMORY = (
    "DefaultCPUAllocator", "can't start new thread", "Resource temporarily unavailable", "failed to map segment",
    "Cannot allocate memory",
)  # fmt: skip
# What the libraries and threads of one process take with a model of a few kB. With less, gloo may wait forever for a
# thread that could not start.
LIBRARIES = 1_250_000  # kB


def require_open_files(world_size: int) -> None:
    """Raises this process's limit to what training among `world_size` ranks takes, which the user may forbid by the
    hard limit (`ulimit -Hn`): UserError."""
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OPEN_FILES + OPEN_FILES_PER_RANK * world_size
    if limit != resource.RLIM_INFINITY and limit < needed:
        if hard == resource.RLIM_INFINITY or hard >= needed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
            return
        raise UserError(
            f"ulimit -n {limit}: a process may open {limit} files, and training on {world_size} "
            f"rank{'s' * (world_size > 1)} takes up to {needed}: `ulimit -n {max(1024, 2 * needed)}` in the shell that "
            "starts it"
        )


def require_address_space(engine: EngineKind) -> None:
    """Raises UserError when `ulimit -v` is less than DeepSpeed's libraries take."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if engine is EngineKind.deepspeed and limit != resource.RLIM_INFINITY and limit < 1024 * LIBRARIES:
        raise UserError(
            f"ulimit -v {limit // 1024}: engine=deepspeed takes {LIBRARIES} kB of address space before there is a "
            "model: `ulimit -v unlimited` in the shell that starts it, or engine=plain"
        )


def out_of_memory(error: Exception) -> str | None:
    """One line about an error that reports a lack of memory; None for any other error."""
    text = str(error)
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, of CUDA
    if not known and not (isinstance(error, (RuntimeError, ImportError)) and any(part in text for part in NO_MEMORY)):
        return None
    ours = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(PACKAGE)
    ]
    where = "".join(
        f" in {Path(last.filename).relative_to(PACKAGE.parent)}:{last.lineno} ({last.name})" for last in ours[-1:]
    )
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    stated = "" if limit == resource.RLIM_INFINITY else f"; ulimit -v is {limit // 1024} kB"
    said = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return f"out of memory{where}: {said}{stated}; `moe plan` says what a run needs"
