"""Tests fork ranks: a fork after multi-threaded torch operations hangs, so the parent keeps to one thread. So do the
processes it starts: on a machine that does something else too, two threads wait for each other most of the time."""

import gc
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests import forkserver

gc.set_threshold(50_000, 20, 20)  # composing a configuration makes 10⁵ objects: the default collects 150 times
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--real-processes", action="store_true", help="start each process anew: tests/forkserver.py")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--real-processes"):
        os.environ[forkserver.ALWAYS_REAL] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Random numbers do not depend on the tests that ran before, of which there are others under each worker."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _environment_of_before() -> Iterator[None]:
    """A file's tests leave no variables: libraries set some (accelerate: LOCAL_RANK, KMP_DUPLICATE_LIB_OK), and a
    process that has others than the fork-server is started anew."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="module", autouse=True)
def _no_process_group() -> Iterator[None]:
    """What joins a process group runs in a rank of its own (tests/ranks.py): ranks forked later would wait for the
    threads of this process's group for ever."""
    yield
    deepspeed: Any = sys.modules.get("deepspeed.comm.comm")
    assert not torch.distributed.is_initialized(), "a test of this file left a process group"
    assert getattr(deepspeed, "cdb", None) is None, "a test of this file left DeepSpeed's process group"
