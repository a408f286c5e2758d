"""Decoding on a CPU in few operations, where the model is made of the modules that `lean_layers` repeats.

The model's own forward pass costs about 1,800 operations a token, most of them for training: gradients, losses, counts,
masks. `open_decoder` takes this path wherever `obstacle` finds nothing against it; prompts always go through the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moe.inference.decoder import ModelDecoder
from moe.inference.lean_layers import Buffers, LeanBlock, LeanNorm, Pass
from moe.model.attention import Attention
from moe.model.block import Block
from moe.model.cache import KVCache
from moe.model.mlp import DenseMLP
from moe.model.norm import RMSNorm
from moe.model.transformer import Decoder, Transformer
from moe.sparse import Experts, Router, SparseMLP

# Modules whose arithmetic `lean_layers` repeats, and containers; a router computes its choices itself.
KNOWN = (
    Transformer, Decoder, Block, Attention, DenseMLP, RMSNorm, SparseMLP, Experts,
    nn.Linear, nn.Embedding, nn.ModuleList,
)  # fmt: skip


def open_decoder(model: Transformer, cache: KVCache) -> ModelDecoder:
    """The fastest decoder that can run `model`, which is in evaluation mode, with its weights of now."""
    return (ModelDecoder if obstacle(model) else LeanDecoder)(model, cache)


def obstacle(model: Transformer) -> str | None:
    """Why `LeanDecoder` can't run this model; None if it can."""
    if model.device.type != "cpu":
        return f"the model is on {model.device.type}, not on a CPU"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    for name, module in model.named_modules():
        hooks = module._forward_hooks, module._forward_pre_hooks
        if not isinstance(module, Router) and type(module) not in KNOWN:
            return f"{name or 'the model'} is a {type(module).__name__}"
        if any(hooks) or "forward" in module.__dict__:
            return f"{name or 'the model'} has hooks or a forward pass of its own"
        if isinstance(module, nn.Linear) and module.bias is not None:
            return f"{name} has a bias"
        if isinstance(module, SparseMLP) and module.expert_group is not None:
            return "its experts are on several ranks"
        if isinstance(module, Attention) and module.window != model.config.sliding_window:
            return f"{name} has a window of its own"
    for name, parameter in model.named_parameters():
        if is_traceable_wrapper_subclass(parameter) or parameter.dtype != model.dtype:
            return f"{name} is a {type(parameter).__name__} of {parameter.dtype} in a model of {model.dtype}"
    return None


class LeanDecoder(ModelDecoder):
    """The decoder for models without an `obstacle`. Holds a joined copy of the weights of q, k and v."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        super().__init__(model, cache)
        self._embedding_VH = model.model.embed_tokens.weight.detach()
        self._blocks = [LeanBlock(block) for block in model.model.layers]  # type: ignore[arg-type]
        self._norm = LeanNorm(model.model.norm)  # type: ignore[arg-type]
        self._head_HV = model.lm_head.weight.detach().t()
        self._buffers = Buffers(model.config, cache.batch, model.dtype)

    @torch.no_grad()
    def step(self, ids_B: list[int]) -> Tensor:
        to, position = self._buffers, self.cache.length
        torch.index_select(self._embedding_VH, 0, torch.tensor(ids_B), out=to.x_BH)
        table = self.model.model._rotary_tables(position, 1, to.x_BH.device, to.x_BH.dtype)
        slots, mask_B11K = self.cache.one_more(), None
        if self.padded:
            mask_B11K = torch.zeros(slots.seen_B11K.shape, dtype=to.x_BH.dtype)
            mask_B11K.masked_fill_(~slots.seen_B11K, -torch.inf)
        first, second = table.sin_S1D.chunk(2, -1)
        now = Pass(table.cos_S1D, (first, second), slots, mask_B11K)
        for block in self._blocks:
            block(to, now)
        self.cache.commit()
        self._norm(to.x_BH, to.normed_BH)
        return to.normed_BH @ self._head_HV
