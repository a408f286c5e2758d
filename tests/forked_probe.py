"""Says what its process is like and ends as told: python -m tests.forked_probe END (tests/unit/test_forkserver.py)."""

from __future__ import annotations

import atexit
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path

from moe.distributed.parent import die_with_parent


def _seen() -> dict[str, object]:
    import __main__

    proc = Path("/proc/self")
    return {
        "pid": os.getpid(),
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "path": sys.path,
        "main": __main__.__spec__.name,
        "cwd": os.getcwd(),
        "environment": dict(sorted(os.environ.items())),
        "cmdline": proc.joinpath("cmdline").read_bytes().rstrip(b"\0").decode(),
        "environ": sorted(proc.joinpath("environ").read_bytes().rstrip(b"\0").decode().split("\0")),
        "parent": os.getppid(),
        "leads": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
        "handlers": {one.name: str(signal.getsignal(one)) for one in signal.Signals},
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "streams": [[one.isatty(), one.encoding, one.errors, one.line_buffering] for one in (sys.stdout, sys.stderr)],
        "descriptors": sorted(os.listdir("/proc/self/fd"))[:3],
        "limits": [resource.getrlimit(one) for one in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS)],
        "umask": os.umask(0o22),
        "threads": threading.active_count(),
    }


def _end(how: str) -> None:
    if how == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
    elif how == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    elif how == "text":
        sys.exit("a text")
    elif how == "fault":
        raise RuntimeError("on purpose")
    elif how == "thread":
        threading.Timer(0.2, print, ["a thread's last line"]).start()
    elif how == "sleep":
        time.sleep(100)
    else:
        sys.exit(int(how))


if __name__ == "__main__":
    die_with_parent()
    atexit.register(lambda: print("at exit", flush=True))
    print(json.dumps(_seen() | {"drawn": random.random(), "forked": "tests.forkserver" in sys.modules}), flush=True)
    print(sys.stdin.read(), end="")
    print("to stderr", file=sys.stderr)
    _end(sys.argv[1] if len(sys.argv) > 1 else "0")
