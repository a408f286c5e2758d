"""Imports DeepSpeed's Muon optimizer without torch's compiler.

To learn which optimizers ZeRO supports, DeepSpeed imports Muon, whose module decorates three functions with
`torch.compile`. That alone loads torch's inductor: over a second of every rank's start, for functions not called.
"""

from __future__ import annotations

import importlib
import os

DISABLE = "TORCHDYNAMO_DISABLE"  # read by each call of torch.compile, which then returns the function itself


def import_muon_uncompiled() -> None:
    """Call it before `deepspeed.initialize`. Other uses of `torch.compile` stay as they are."""
    stated = os.environ.get(DISABLE)
    os.environ[DISABLE] = "1"
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        if stated is None:
            del os.environ[DISABLE]
        else:
            os.environ[DISABLE] = stated
