"""`moe doctor`: whether this machine can train, and what would run how, in at most 20 seconds.

    moe doctor                                  one table; exit code 1 when something fails
    moe doctor --json                           the same as one JSON object
    moe doctor run_dir=/shared/runs             checks this folder's disk (default: runs)
    torchrun --nproc-per-node 1 --nnodes 2 …    … -m moe doctor run_dir=/shared/runs: do all nodes see the same files?

Each check is a function of `software`, `machine`, `storage` or `network` that returns findings.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from moe.doctor.finding import Finding
from moe.errors import UserError

SECONDS = 16.0  # until the training step must be done; the measurement of speed takes another or two
STYLES = {"ok": "green", "note": "yellow", "fail": "bold red"}


def run_doctor(arguments: list[str]) -> None:
    """Prints the findings. Raises UserError for a bad argument, SystemExit(1) when a check fails."""
    as_json = "--json" in arguments
    folders = {"run_dir": "runs", "data.cache_dir": "~/.cache/moe"}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if argument != "--json" and (key not in folders or not value):
            raise UserError(f"doctor {argument}: its keys are {', '.join(f'{name}=…' for name in folders)} and --json")
        if argument != "--json":
            folders[key] = value
    started = time.monotonic()
    found = diagnose(Path(folders["run_dir"]).expanduser(), Path(folders["data.cache_dir"]).expanduser())
    seconds = time.monotonic() - started
    failed = [finding for finding in found if finding.state == "fail"]
    if as_json:
        checks = [{"name": one.name, "state": one.state, "found": one.found, "fix": one.fix} for one in found]
        print(
            json.dumps({"ok": not failed, "seconds": round(seconds, 1), "checks": checks}, indent=1, ensure_ascii=False)
        )
    else:
        _print_table(found, seconds)
    if failed:
        raise SystemExit(1)


def diagnose(run_dir: Path, cache_dir: Path) -> list[Finding]:
    """Every check's findings. A check that raises is a failed one with its error."""
    from moe.doctor import machine, network, software, storage

    deadline = time.monotonic() + SECONDS
    smoke = software.start_training()  # takes seconds, in a process of its own
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("packages", software.packages),
        ("torch", software.torch_build),
        ("back-ends", software.backends),
        ("cores", machine.cores),
        ("memory", machine.memory),
        ("limits", machine.limits),
        ("disk", lambda: storage.disk("run_dir", run_dir)),
        ("shared files", lambda: storage.shared(run_dir)),
        ("data cache", lambda: storage.disk("data.cache_dir", cache_dir)),
        ("W&B", software.tracking),
        ("network", network.ports),
        ("training", lambda: software.finish_training(smoke, deadline - time.monotonic())),
        ("speed", machine.speed),  # last: the training step would slow it down
    ]
    found: list[Finding] = []
    for name, check in checks:
        try:
            found += check()
        except Exception as error:  # whatever is wrong with the machine is this check's result
            found.append(Finding(name, "fail", f"{type(error).__name__}: {' '.join(str(error).split())}"))
    return found


def _print_table(found: list[Finding], seconds: float) -> None:
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    for one in found:
        text = one.found + (f"\n→ {one.fix}" if one.fix else "")
        table.add_row(one.name, f"[{STYLES[one.state]}]{one.state}[/]", text)
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120)
    console.print(table)
    counts = {state: sum(one.state == state for one in found) for state in STYLES}
    console.print(", ".join(f"{count} {state}" for state, count in counts.items()) + f"; {seconds:.0f} s")
