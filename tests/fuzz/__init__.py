"""Seeded cases of bad input at the real command line: `python -m tests.fuzz` (tests/fuzz/__main__.py)."""
