"""Imports DeepSpeed's modules without what they load and a run doesn't use.

- To learn which optimizers ZeRO supports, DeepSpeed imports Muon, whose module decorates three functions with
  `torch.compile`. That alone loads torch._dynamo and torch's inductor: two seconds of every rank's start, for functions
  not called.
- DeepSpeed imports Triton where it is installed: 65 MiB of every rank. Its module then finds that a CPU has no use for
  it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from deepspeed.runtime import compiler

from moe.engine.deepspeed.borrowed import borrow_value

Function = Callable[..., Any]


def import_muon_uncompiled() -> None:
    """Call it before `deepspeed.initialize`. Other uses of `torch.compile` stay as they are."""
    compile_ = borrow_value(compiler, "compile", lost="every rank would start later")

    def left_as_it_is(*_: object, **__: object) -> Callable[[Function], Function]:
        return lambda function: function

    setattr(compiler, "compile", left_as_it_is)  # noqa: B010  # another signature than its own
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        setattr(compiler, "compile", compile_)  # noqa: B010


def import_ops_without_triton() -> None:
    """Call it before `deepspeed.initialize` where the model is on a CPU. Later imports of Triton are as before."""
    if "triton" in sys.modules:
        return
    modules: dict[str, Any] = sys.modules
    modules["triton"] = None  # an import of it fails, as where it isn't installed
    try:
        importlib.import_module("deepspeed.ops.triton_ops")
    finally:
        del modules["triton"]
