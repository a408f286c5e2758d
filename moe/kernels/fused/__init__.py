"""Triton kernels for CUDA, one pass over memory each; `moe.kernels.policy.runs_fused` says where they run.

They read and write the tensors' dtype and compute in float32. None adds atomically, so results are deterministic. Only
this folder imports triton, which comes with torch's CUDA builds; nothing here is imported where it is missing.

NOTE: of `tl`, kernels use built-in functions only, not those that are jitted themselves (`tl.sum`, `tl.zeros`): so a
test can interpret them in a process that has imported triton before.
"""
