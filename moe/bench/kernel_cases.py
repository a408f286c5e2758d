"""The kernels of a training step with their references, for `moe bench kernels`: ours, plain PyTorch's,
transformers', DeepSpeed's.

Legend: B batch, S sequence, T = B·S tokens, H hidden, N query heads, G key/value heads, D head dimension, K choices of
a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.bench.kernel_case import Case, Side
from moe.bench.kernel_cases_layer import layer_cases
from moe.bench.kernel_cases_sparse import sparse_cases
from moe.bench.peer import peer_model
from moe.bench.routing import even_experts
from moe.bench.stepper import random_batch
from moe.config import AttentionBackend, Config
from moe.kernels.attention import make_attend, resolve_attention
from moe.kernels.attention.pattern import pattern_mask
from moe.kernels.cross_entropy import IGNORED, cross_entropy_reference, linear_cross_entropy
from moe.kernels.rms_norm import rms_norm, rms_norm_reference
from moe.kernels.rotary import RotaryTables, project_rotated, project_rotated_reference
from moe.model.build import build_model
from moe.model.context import Context
from moe.plan.counts import visible_keys
from moe.sparse.routers.base import Choices

LARGEST_SCORES = 1 << 30  # bytes of all of attention's scores, for which the plain reference is left out
PEER_EXPERTS = ("eager", "grouped_mm")


class Cases:
    """Of the first layer of `config`'s model, with its initial weights and random inputs, in `dtype` on the CPU."""

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        one = replace(config, model=replace(config.model, num_hidden_layers=1))
        self.config, self.dtype, self._generator = one, dtype, torch.Generator().manual_seed(one.train.seed)
        self.model = build_model(one, torch.device("cpu"))
        weights = self.model.state_dict()
        self.peers = {name: peer_model(one, name) for name in PEER_EXPERTS}
        for peer in self.peers.values():
            peer.load_state_dict(weights)
            peer.to(dtype)
        self.peer: Any = self.peers[PEER_EXPERTS[0]]
        self.model.to(dtype)
        self.layer: Any = self.model.get_submodule("model.layers.0")
        self.shape = one.train.micro_batch_size, one.train.sequence_length
        self.tokens = self.shape[0] * self.shape[1]

    def __iter__(self) -> Iterator[Case]:
        yield self._norm()
        yield self._projections()
        yield self._scores()
        yield self._attention()
        yield self._router()
        x_BSH = self._random(*self.shape, self.config.model.hidden_size)
        own = self.layer.mlp.gate(x_BSH).choices
        experts, top_k = self.config.router.num_experts, own.per_token
        even_TK = even_experts(self.tokens * top_k, experts, torch.device("cpu")).view(-1, top_k)
        uniform = Choices.top_k(even_TK, torch.full(even_TK.shape, 1 / top_k))
        for name, choices in (("own routing", own), ("uniform routing", uniform)):
            yield from sparse_cases(name, choices, self.layer.mlp.experts, self._peers_experts(), x_BSH.detach())
        yield from self.layers()
        yield self._loss()
        yield self._optimizer()

    def _random(self, *shape: int, grad: bool = True) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.dtype).requires_grad_(grad)

    def _norm(self) -> Case:
        x_BSH = self._random(*self.shape, self.config.model.hidden_size)
        eps, ours, theirs = (
            self.config.model.rms_norm_eps,
            self.layer.input_layernorm.weight,
            self.peer.model.layers[0].input_layernorm,
        )
        return Case(
            "norm",
            {
                "ours": Side(lambda: [rms_norm(x_BSH, ours, eps)], [x_BSH, ours]),
                "PyTorch": Side(lambda: [rms_norm_reference(x_BSH, ours, eps)], [x_BSH, ours]),
                "transformers": Side(lambda: [theirs(x_BSH)], [x_BSH, theirs.weight]),
            },
        )

    def _projections(self) -> Case:
        model, attention = self.config.model, self.layer.self_attn
        x_BSH, table = self._random(*self.shape, model.hidden_size), self._table()
        q, k, v = weights = [getattr(attention, f"{name}_proj").weight for name in "qkv"]
        return Case(
            "projections and rotation",
            {
                "ours": Side(lambda: project_rotated(x_BSH, q, k, v, table), [x_BSH, *weights]),
                "PyTorch": Side(lambda: project_rotated_reference(x_BSH, q, k, v, table), [x_BSH, *weights]),
            },
            flops=6 * self.tokens * model.hidden_size * sum(map(len, weights)),
        )

    def _scores(self) -> Case:
        model, device = self.config.model, torch.device("cpu")
        heads = (model.num_attention_heads, model.num_key_value_heads, model.num_key_value_heads)
        tensors = [self._random(*self.shape, count, model.head_size) for count in heads]
        attend = make_attend(self._backend(), self.shape, model.sliding_window, None, device)
        sides = {"ours": Side(lambda: [attend(*tensors)], tensors)}
        if 4 * self.tokens * self.shape[1] * heads[0] <= LARGEST_SCORES:
            plain = make_attend(AttentionBackend.naive, self.shape, model.sliding_window, None, device)
            sides["PyTorch"] = Side(lambda: [plain(*tensors)], tensors)
        return Case("attention's scores", sides, flops=self._score_flops())

    def _attention(self) -> Case:
        model, ours, theirs = self.config.model, self.layer.self_attn, self.peer.model.layers[0].self_attn
        x_BSH = self._random(*self.shape, model.hidden_size)
        names = [f"{name}_proj.weight" for name in "qkvo"]
        table, device = self._table(), torch.device("cpu")
        positions = self.peer.model.rotary_emb(x_BSH, torch.arange(self.shape[1])[None])
        window = model.sliding_window
        masked = window is not None and window < self.shape[1]
        mask = pattern_mask(self.shape[1], window, None, device) if masked else None

        def forward() -> list[Tensor]:
            return [ours(x_BSH, Context(table, self._backend(), self.shape, device, None, None, None))]

        def peers_forward() -> list[Tensor]:
            return [theirs(x_BSH, position_embeddings=positions, attention_mask=mask)[0]]

        leaves = {side: [x_BSH, *map(side.get_parameter, names)] for side in (ours, theirs)}
        return Case(
            "attention, whole",
            {"ours": Side(forward, leaves[ours]), "transformers": Side(peers_forward, leaves[theirs])},
            flops=self._score_flops() + 6 * self.tokens * sum(weight.numel() for weight in leaves[ours][1:]),
        )

    def _router(self) -> Case:
        """transformers' computes no losses, and its bfloat16 products choose other experts: it is left out there."""
        x_BSH, gate = self._random(*self.shape, self.config.model.hidden_size), self.layer.mlp.gate
        theirs = self.peer.model.layers[0].mlp.gate
        sides = {"ours, with losses": Side(lambda: [gate(x_BSH).choices.weights_N], [x_BSH, gate.weight])}
        if self.dtype is torch.float32:
            sides["transformers"] = Side(lambda: [theirs(x_BSH)[1].flatten()], [x_BSH, theirs.weight])
        return Case("router", sides, flops=6 * self.tokens * gate.weight.numel())

    def layers(self) -> Iterator[Case]:
        """The whole sparse layer. transformers' is left out in bfloat16, as its router is."""
        exact = self.dtype is torch.float32
        blocks = {f"transformers, {name}": peer.model.layers[0].mlp for name, peer in self.peers.items() if exact}
        x_BSH = self._random(*self.shape, self.config.model.hidden_size, grad=False)
        return layer_cases(self.layer.mlp, blocks, x_BSH)

    def _peers_experts(self) -> dict[str, nn.Module]:
        return {f"transformers, {name}": peer.model.layers[0].mlp.experts for name, peer in self.peers.items()}

    def _loss(self) -> Case:
        from transformers.loss.loss_utils import ForCausalLMLoss

        model = self.config.model
        x_BSH, head, theirs = self._random(*self.shape, model.hidden_size), self.model.lm_head, self.peer.lm_head
        labels_BS = random_batch(self.config, self._generator).labels_BS
        targets, labels_T = int((labels_BS != IGNORED).sum()), labels_BS.flatten()

        def ours() -> list[Tensor]:
            return [linear_cross_entropy(x_BSH.flatten(0, 1), head.weight, labels_T)]

        def plain() -> list[Tensor]:
            return [cross_entropy_reference(F.linear(x_BSH.flatten(0, 1), head.weight), labels_T)]

        def peers_loss() -> list[Tensor]:
            return [targets * ForCausalLMLoss(theirs(x_BSH), None, model.vocab_size, shift_labels=labels_BS)]

        return Case(
            "head and loss",
            {
                "ours": Side(ours, [x_BSH, head.weight]),
                "PyTorch": Side(plain, [x_BSH, head.weight]),
                "transformers": Side(peers_loss, [x_BSH, theirs.weight]),
            },
            flops=6 * self.tokens * head.weight.numel(),
        )

    def _optimizer(self) -> Case:
        """AdamW on float32 weights, fused as in our engines, and torch's loop over tensors."""
        shapes = [parameter.shape for parameter in self.model.parameters()]
        drawn = [[torch.randn(shape, generator=self._generator) for shape in shapes] for _ in range(2)]
        size = sum(shape.numel() for shape in shapes)
        return Case(
            f"AdamW, {size / 1e6:.1f} M parameters",
            {"ours": _adamw(*drawn, fused=True), "PyTorch": _adamw(*drawn, fused=False)},
            bytes=28 * size,
        )

    def _table(self) -> Any:
        model = self.config.model
        tables = RotaryTables(model.head_size, model.rope_theta, model.rope_scaling)
        return tables(0, self.shape[1], torch.device("cpu"), self.dtype)

    def _backend(self) -> AttentionBackend:
        model = self.config.model
        return resolve_attention(model.attention, torch.device("cpu"), self.dtype, model.head_size)[0]

    def _score_flops(self) -> float:
        model = self.config.model
        keys = visible_keys(self.shape[1], model.sliding_window)
        return 12 * self.tokens * model.num_attention_heads * model.head_size * keys


def _adamw(weights: list[Tensor], gradients: list[Tensor], *, fused: bool) -> Side:
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=fused, foreach=False)

    def step() -> list[Tensor]:
        optimizer.step()
        return [parameter.detach() for parameter in parameters]

    return Side(step)
