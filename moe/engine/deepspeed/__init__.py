import os

import torch

# What DeepSpeed reads when it is imported, which both engine and master do.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_RANK", "0")  # it insists on it, also for a plain single process
