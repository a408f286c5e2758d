import os

import torch

# Environment variables that DeepSpeed reads when it is imported; every module of this folder imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it, even in a single process
