"""Rows, scores and pages of the worked examples (docs/fine-tuning.md); started by launch/examples/NAME.sh."""
