"""Tests fork ranks: a fork after multi-threaded torch operations hangs, so the parent keeps to one thread. So do the
processes it starts: on a machine that does something else too, two threads wait for each other most of the time."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
