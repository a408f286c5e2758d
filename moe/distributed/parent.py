"""A process dies with the one that started it: a rank with its torchrun, a trial with its `moe sweep`.

torchrun gives each rank a session of its own, so that neither a closed terminal nor `kill -9` of torchrun reaches the
ranks: they would train on, or hold their GPUs and the run directory, with nobody to restart or to end them. A trial
would do the same after `kill -9` of `moe sweep`, and the next command would find its run directory in use.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from moe.errors import StartError

DIE_WITH = "MOE_DIE_WITH"  # environment variable: the process id of the parent that this process must not outlive
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """From now on the kernel sends SIGKILL to this process when its torchrun, or the process that DIE_WITH names, is
    gone. Linux only.

    Call it first: the parent may be killed while this process still loads its libraries. Raises StartError
    when the parent was gone already, OSError when the kernel refuses.
    """
    named = os.environ.pop(DIE_WITH, None)  # it isn't about processes that this one starts
    if (named is None and "TORCHELASTIC_RUN_ID" not in os.environ) or sys.platform != "linux":
        return
    parent = str(os.getppid()) if named is None else named
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    if str(os.getppid()) != parent:  # it died in between: the kernel's signal will not come
        raise StartError(f"process {parent}, which started this one, ended meanwhile", prints=True)
