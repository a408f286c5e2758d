"""Grouped-query attention (arXiv 2305.13245) with rotary positions; the context decides which keys are visible.

Legend: B batch, S sequence, H hidden, N query heads, G key/value heads, D head dimension, P = N·D or G·D.
"""

from __future__ import annotations

from torch import Tensor, nn

from moe.config import ModelConfig, QkNorm
from moe.kernels.rotary import RotaryTable, project_rotated, rotated
from moe.model.context import ATTENTION, Context
from moe.model.linear import plain_weight, project
from moe.model.norm import build_norm
from moe.sparse import Randomness


class Attention(nn.Module):
    """`window` is the number of keys that a query sees, its own included; None: its own and all before it."""

    def __init__(self, config: ModelConfig, layer: int, window: int | None) -> None:
        super().__init__()
        queries = config.num_attention_heads * config.head_size
        keys = config.num_key_value_heads * config.head_size
        self.layer, self.window, self.head_dim = layer, window, config.head_size
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.qk_norm = config.qk_norm
        if self.qk_norm is not QkNorm.none:
            per_head = self.qk_norm is QkNorm.head
            self.q_norm = build_norm(config, self.head_dim if per_head else queries)
            self.k_norm = build_norm(config, self.head_dim if per_head else keys)

    def forward(self, x_BSH: Tensor, context: Context) -> Tensor:
        randomness = context.randomness_at(self.layer, ATTENTION)
        q_BSND, k_BSGD, v_BSGD = self._project(x_BSH, context.table, randomness)
        y_BSH = context.attend(self.layer, self.window, q_BSND, k_BSGD, v_BSGD)
        return project(self.o_proj, y_BSH, None if randomness is None else randomness.fork(3))

    def _project(
        self, x_BSH: Tensor, table: RotaryTable, randomness: Randomness | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values; by one matrix product if all three modules are plain linear layers and
        nothing comes between them and the rotation."""
        if self.qk_norm is QkNorm.none:
            q, k, v = (plain_weight(module) for module in (self.q_proj, self.k_proj, self.v_proj))
            if q is not None and k is not None and v is not None:
                return project_rotated(x_BSH, q, k, v, table)
        forks = [None if randomness is None else randomness.fork(number) for number in range(3)]
        q_BSP, k_BSP, v_BSP = (
            project(module, x_BSH, fork)
            for module, fork in zip((self.q_proj, self.k_proj, self.v_proj), forks, strict=True)
        )
        if self.qk_norm is QkNorm.projection:
            q_BSP, k_BSP = self.q_norm(q_BSP), self.k_norm(k_BSP)
        q_BSND, k_BSGD, v_BSGD = (one.unflatten(-1, (-1, self.head_dim)) for one in (q_BSP, k_BSP, v_BSP))
        if self.qk_norm is QkNorm.head:
            q_BSND, k_BSGD = self.q_norm(q_BSND), self.k_norm(k_BSGD)
        return rotated(q_BSND, table), rotated(k_BSGD, table), v_BSGD
