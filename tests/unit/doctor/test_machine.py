"""The checks of cores, memory and limits."""

import subprocess
import sys

import torch

from moe.doctor import machine, network


def test_memory_that_a_limit_leaves_is_noted() -> None:
    (found,) = machine.memory()
    assert found.found.endswith("GB left")
    program = "from moe.doctor.machine import memory; one, = memory(); print(one.state, one.found, one.fix)"
    command = ["bash", "-c", f"ulimit -v 1500000; exec {sys.executable} -c '{program}'"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("note ")
    assert "model=tiny" in done.stdout


def test_few_open_files_are_noted() -> None:
    program = "from moe.doctor.machine import limits; one, = limits(); print(one.state, one.found, one.fix)"
    command = ["bash", "-c", f"ulimit -n 64; exec {sys.executable} -c '{program}'"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("note 64 open files")
    assert done.stdout.rstrip().endswith("ulimit -n 1024")


def test_cores_and_processor_are_named() -> None:
    (found,) = machine.cores()
    assert "usable cores of" in found.found


def test_speed_is_measured() -> None:
    threads = torch.get_num_threads()
    try:
        (found,) = machine.speed()
    finally:
        torch.set_num_threads(threads)  # tests that fork need the one thread of tests/conftest.py
    assert "GFLOP/s; copies" in found.found
    assert network.ports()
