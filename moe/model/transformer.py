"""The decoder: Mistral with `model.mlp=dense`, Mixtral with `model.mlp=sparse` (arXiv 2310.06825, 2401.04088).

Parameter names are those of transformers 5's `MistralForCausalLM` and `MixtralForCausalLM`.
Legend: B batch, S sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moe.config import ExpertsConfig, Mlp, ModelConfig, RouterConfig
from moe.model.attention import Attention, build_mask
from moe.model.mlp import DenseMLP
from moe.model.norm import RMSNorm
from moe.model.rope import rotary_table

if TYPE_CHECKING:
    from moe.sparse.router import RouterOutput


@dataclass(slots=True)
class ModelOutput:
    logits_BSV: Tensor | None  # None when labels are given
    lm_loss_sum: Tensor | None  # float32 sum of cross-entropy over labels ≠ −100; None without labels
    routers: list[RouterOutput]  # one per sparse layer, in order; [] for a dense model


class Block(nn.Module):
    def __init__(
        self, model: ModelConfig, router: RouterConfig, experts: ExpertsConfig, expert_group: ProcessGroup | None
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(model.hidden_size, model.rms_norm_eps)
        self.self_attn = Attention(model)
        self.post_attention_layernorm = RMSNorm(model.hidden_size, model.rms_norm_eps)
        self.sparse = model.mlp is Mlp.sparse
        if self.sparse:
            from moe.sparse.layer import SparseMLP

            self.mlp = SparseMLP(model.hidden_size, model.intermediate_size, router, experts, expert_group=expert_group)
        else:
            self.mlp = DenseMLP(model.hidden_size, model.intermediate_size)

    def forward(self, x_BSH: Tensor, *attention: Any) -> tuple[Tensor, RouterOutput | None]:
        x_BSH = x_BSH + self.self_attn(self.input_layernorm(x_BSH), *attention)
        out = self.mlp(self.post_attention_layernorm(x_BSH))
        y_BSH, routed = out if self.sparse else (out, None)
        return x_BSH + y_BSH, routed


class Decoder(nn.Module):
    """Everything but the head; a module of its own only because the parameter names say `model.`."""

    def __init__(
        self, model: ModelConfig, router: RouterConfig, experts: ExpertsConfig, expert_group: ProcessGroup | None
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(Block(model, router, experts, expert_group) for _ in range(model.num_hidden_layers))
        self.norm = RMSNorm(model.hidden_size, model.rms_norm_eps)


class Transformer(nn.Module):
    """The language model. With an `expert_group` of N ranks each holds 1/N of every layer's experts."""

    def __init__(
        self,
        model: ModelConfig,
        router: RouterConfig,
        experts: ExpertsConfig,
        *,
        expert_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.config, self.expert_group = model, expert_group
        self.model = Decoder(model, router, experts, expert_group)
        self.lm_head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        if model.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """N(0, initializer_range), norms 1: a function of (seed, parameter name, global expert index) alone.

        So the same model starts at any number of ranks, any expert degree, on any device.
        """
        rank = torch.distributed.get_rank(self.expert_group) if self.expert_group is not None else 0
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif ".experts." in name:
                first = rank * parameter.shape[0]
                for index, expert in enumerate(parameter):
                    self._fill(expert, seed, f"{name}.{first + index}")
            else:
                self._fill(parameter, seed, name)

    def _fill(self, weight: Tensor, seed: int, name: str) -> None:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        weight.copy_(torch.randn(weight.shape, generator=generator).mul_(self.config.initializer_range))

    def forward(
        self,
        input_ids_BS: Tensor,
        *,
        document_ids_BS: Tensor | None = None,
        labels_BS: Tensor | None = None,
        cache: None = None,
    ) -> ModelOutput:
        """`document_ids_BS` never falls along S; tokens see their own document only (None: one document)."""
        config, length = self.config, input_ids_BS.shape[1]
        assert config.head_dim is not None
        x_BSH = self.model.embed_tokens(input_ids_BS)
        cos_SD, sin_SD = rotary_table(0, length, config.head_dim, config.rope_theta, x_BSH.device)
        mask = build_mask(length, config.sliding_window, document_ids_BS, x_BSH.device)
        routers = []
        for block in self.model.layers:
            x_BSH, routed = block(x_BSH, cos_SD, sin_SD, mask)
            if routed is not None:
                routers.append(routed)
        logits_BSV = self.lm_head(self.model.norm(x_BSH))
        if labels_BS is None:
            return ModelOutput(logits_BSV, None, routers)
        loss = F.cross_entropy(logits_BSV.flatten(0, 1).float(), labels_BS.flatten(), reduction="sum")
        return ModelOutput(None, loss, routers)
