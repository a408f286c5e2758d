"""The checks of cores, memory and limits."""

import subprocess
import sys

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
    """In a process of its own: ranks that are forked from one that has computed with several threads hang."""
    program = "from moe.doctor.machine import speed; one, = speed(); print(one.found)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert "GFLOP/s; copies" in done.stdout


def test_ports_are_checked() -> None:
    assert network.ports()
