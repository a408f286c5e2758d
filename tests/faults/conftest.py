"""Faults that a training run meets, each test a row of docs/reliability.md (tests/fault_table.py)."""

from tests.e2e.conftest import corpus, moe

__all__ = ["corpus", "moe"]
