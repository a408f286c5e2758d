"""Tests fork ranks: a fork after multi-threaded torch operations hangs, so the parent keeps to one thread."""

import torch

pytest_plugins = ["tests.fault_table"]
torch.set_num_threads(1)
