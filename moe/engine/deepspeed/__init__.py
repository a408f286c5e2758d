import os

import torch

# DeepSpeed reads it when it is imported; every module of this folder imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
