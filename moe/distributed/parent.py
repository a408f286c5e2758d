"""A rank dies with the torchrun that started it.

torchrun gives each rank a session of its own, so that neither a closed terminal nor `kill -9` of torchrun reaches the
ranks: they would train on, or hold their GPUs and the run directory, with nobody to restart or to end them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from moe.errors import StartError

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_torchrun() -> None:
    """From now on the kernel sends SIGKILL to this process when its torchrun is gone. Linux only.

    Call it first: torchrun may be killed while this process still loads its libraries. Raises StartError
    when torchrun was gone already, OSError when the kernel refuses.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    if os.getppid() != parent:  # it died in between: the kernel's signal will not come
        raise StartError("torchrun ended while this rank started", prints=True)
