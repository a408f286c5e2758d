"""Checks rows for fine-tuning before a run: every bad row, what is learnt, how long it takes."""
