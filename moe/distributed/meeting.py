"""Before any rank waits in a collective, all of them meet in the store: missing ranks and different configurations are
reported by name.

The steps, all in torchrun's store:

1. Rank 0 draws a session name and waits.
2. Every other rank draws a token and writes it under `hello/RANK`.
3. Rank 0 answers each token with the session name, under `welcome/TOKEN`.
4. Every rank writes its configuration, its versions and a digest of its code under the session name.
5. Rank 0 compares them and writes the verdict, which all ranks read and follow.

NOTE: keys outlive a restart, since torchrun keeps its store. Session names and tokens are drawn anew by every process,
so the keys of a dead attempt are never taken for this one's. torchrun's own TORCHELASTIC_RESTART_COUNT can't replace
them: on several nodes only the node whose worker died counts the restart.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from moe.distributed.code import PREFIX, running_code
from moe.errors import StartError

TIMEOUT_VARIABLE = "MOE_START_TIMEOUT"  # seconds
DEFAULT_TIMEOUT = 300.0
MAX_TIMEOUT = 86400.0  # a day
POLL_SECONDS = 0.02
GRACE = 10.0  # seconds for the others to read the verdict, and for rank 0 to write it after its own time-out
SHOWN_KEYS = 3


def start_timeout() -> float:
    """Seconds that a rank waits for the others at the start. Raises StartError."""
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text or DEFAULT_TIMEOUT)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= MAX_TIMEOUT:
        raise StartError(
            f"{TIMEOUT_VARIABLE}={text} must be a number of seconds > 0 and ≤ {MAX_TIMEOUT:g}", prints=True
        )
    return seconds


def meet(
    store: Store, rank: int, world_size: int, config: Mapping[str, object], timeout: float, *, owns_store: bool
) -> str:
    """The session's name, the same on all ranks, once each has come with the same `config` and code.

    Raises StartError on every rank that came: the ranks that didn't within `timeout` seconds, or the keys that differ.
    `owns_store`: the others' connection ends with this process, so it leaves last.
    """
    meeting = PrefixStore("meeting", store)
    configuration = json.dumps({key: str(value) for key, value in config.items()} | running_code())
    if rank == 0:
        return _host(meeting, world_size, configuration, timeout, owns_store)
    return _attend(meeting, rank, world_size, configuration, timeout)


def _host(store: Store, world_size: int, configuration: str, timeout: float, owns_store: bool) -> str:
    session = uuid.uuid4().hex
    store.set(f"{session}/0", configuration)
    missing, welcomed = set(range(1, world_size)), set()
    deadline = time.monotonic() + timeout
    while missing and time.monotonic() < deadline:
        for rank in sorted(missing):
            if store.check([f"{session}/{rank}"]):
                missing.remove(rank)
            elif store.check([f"hello/{rank}"]):
                token = store.get(f"hello/{rank}").decode()
                if token not in welcomed:
                    welcomed.add(token)
                    store.set(f"welcome/{token}", session)
        time.sleep(POLL_SECONDS)
    if missing:
        error = _never_came(missing, world_size, timeout)
    else:
        raw = store.multi_get([f"{session}/{rank}" for rank in range(world_size)])
        error = differences([json.loads(text) for text in raw])
    store.set(f"verdict/{session}", error)
    if not error:
        return session
    present = world_size - 1 - len(missing)
    deadline = time.monotonic() + GRACE
    while owns_store and store.add(f"read/{session}", 0) < present and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    raise StartError(error, prints=True)


def _attend(store: Store, rank: int, world_size: int, configuration: str, timeout: float) -> str:
    token = uuid.uuid4().hex
    store.set(f"hello/{rank}", token)
    try:
        store.wait([f"welcome/{token}"], timedelta(seconds=timeout))
    except dist.DistError as error:
        try:
            missing = {0} | {other for other in range(world_size) if not store.check([f"hello/{other}"])}
        except dist.DistError:
            missing = {0}  # and the store with it
        # No other rank may be left to report it.
        raise StartError(_never_came(missing, world_size, timeout), prints=True) from error
    session = store.get(f"welcome/{token}").decode()
    store.set(f"{session}/{rank}", configuration)
    try:
        store.wait([f"verdict/{session}"], timedelta(seconds=timeout + GRACE))
        verdict = store.get(f"verdict/{session}").decode()
        store.add(f"read/{session}", 1)
    except dist.DistError as error:
        raise StartError("rank 0 ended before all ranks had started: the cause is in its output") from error
    if verdict:
        raise StartError(verdict)
    return session


def _never_came(missing: set[int], world_size: int, timeout: float) -> str:
    return (
        f"{_ranks(missing)} of {world_size} did not reach the start within {timeout:g} s: see the log of that process "
        f"or node, and whether it can reach MASTER_ADDR ({TIMEOUT_VARIABLE}=SECONDS waits longer)"
    )


def differences(configs: list[dict[str, str]]) -> str:
    """One line: the first keys that differ, with their values and ranks. Empty if all are equal. Where code differs,
    only that: other code may well have other keys."""
    keys = sorted({key for config in configs for key in config})
    different = [key for key in keys if len({config.get(key) for config in configs}) > 1]
    code = [key for key in different if key.startswith(PREFIX)]
    if code:
        found = _values(configs, code, PREFIX)
        return f"the ranks run different code: {found}: install the same versions on every node, of moe's source too"
    if not different:
        return ""
    more = len(different) - SHOWN_KEYS
    return (
        f"the ranks were started with different configurations: {_values(configs, different[:SHOWN_KEYS])}"
        + (f"; and {more} more key{'s' * (more > 1)}" if more > 0 else "")
        + ": start every node with the same overrides"
    )


def _values(configs: list[dict[str, str]], keys: list[str], prefix: str = "") -> str:
    """`key=value on ranks 0-2, other on rank 3; …`, without the keys' prefix."""
    shown = []
    for key in keys:
        holders: dict[str, set[int]] = {}
        for rank, config in enumerate(configs):
            holders.setdefault(config.get(key, "nothing"), set()).add(rank)
        values = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in holders.items())
        shown.append(f"{key.removeprefix(prefix)}={values}")
    return "; ".join(shown)


def _ranks(ranks: set[int]) -> str:
    """`rank 3`, `ranks 0-2,5`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank{'s' * (len(ranks) > 1)} {text}"
