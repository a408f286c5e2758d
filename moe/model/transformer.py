"""The decoder: Mistral with `model.mlp=dense`, Mixtral with `model.mlp=sparse` (arXiv 2310.06825, 2401.04088).

Parameter names are those of transformers 5's `MistralForCausalLM` and `MixtralForCausalLM`.
Legend: B batch, S sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moe.config import ExpertsConfig, ModelConfig, RouterConfig
from moe.kernels.attention import resolve_attention
from moe.kernels.rotary import RotaryTables
from moe.model.block import Block, Pending, given
from moe.model.cache import KVCache
from moe.model.context import Context
from moe.model.initialize import fill_weights
from moe.model.loss import head_loss
from moe.model.neftune import noisy
from moe.model.norm import build_norm
from moe.sparse import Randomness, RealTokens, RouterOutput, SparseMLP, routers_of


@dataclass(slots=True)
class ModelOutput:
    logits_BSV: Tensor | None  # of the positions asked for; None when labels are given
    lm_loss_sum: Tensor | None  # float32 sum of cross-entropy over labels ≠ −100; None without labels
    routers: list[RouterOutput]  # one per sparse layer, in order; [] for a dense model


class Decoder(nn.Module):
    """Everything but the head; a separate module only because Hugging Face's parameter names begin with `model.`."""

    def __init__(
        self, model: ModelConfig, router: RouterConfig, experts: ExpertsConfig, expert_group: ProcessGroup | None
    ) -> None:
        super().__init__()
        self.config = model
        self._rotary_tables = RotaryTables(model.head_size, model.rope_theta, model.rope_scaling)
        self.embed_tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(
            Block(layer, model, router, experts, expert_group) for layer in range(model.num_hidden_layers)
        )
        self.norm = build_norm(model, model.hidden_size)
        mlps = (layer.mlp for layer in self.layers if isinstance(layer, Block))
        exchanges = any(isinstance(mlp, SparseMLP) and mlp.expert_group is not None for mlp in mlps)
        self.overlaps_halves = experts.two_batch_overlap and exchanges

    def forward(
        self,
        input_ids_BS: Tensor,
        document_ids_BS: Tensor | None,
        cache: KVCache | None,
        randomness: Randomness | None,
        neftune_noise_alpha: float | None = None,
        real_T: Tensor | None = None,
        document_lengths: list[int] | None = None,
    ) -> tuple[Tensor, list[RouterOutput]]:
        x_BSH, routers = self.embed_tokens(input_ids_BS), []
        if neftune_noise_alpha is not None and self.training:
            if randomness is None:
                raise ValueError(f"neftune_noise_alpha={neftune_noise_alpha} needs the batch's randomness")
            x_BSH = noisy(x_BSH, document_ids_BS, neftune_noise_alpha, randomness)
        context = self._context(x_BSH, document_ids_BS, cache, randomness, real_T, document_lengths)
        if self.overlaps_halves and cache is None and context.shape[0] > 1:
            x_BSH, routers = self._in_halves(x_BSH, context)
        else:
            for block in self.layers:
                x_BSH, routed = block(x_BSH, context)
                if routed is not None:
                    routers.append(routed)
        if cache is not None:
            cache.commit()
        return self.norm(x_BSH), routers

    def _in_halves(self, x_BSH: Tensor, context: Context) -> tuple[Tensor, list[RouterOutput]]:
        contexts, routers = context.halves(), []
        halves: list[Pending] = [partial(given, half) for half in x_BSH.split([each.shape[0] for each in contexts])]
        for block in self.layers:
            assert isinstance(block, Block)
            halves, routed = block.forward_in_halves(halves, contexts, context)
            if routed is not None:
                routers.append(routed)
        return torch.cat([half() for half in halves]), routers

    def _context(
        self,
        x_BSH: Tensor,
        document_ids_BS: Tensor | None,
        cache: KVCache | None,
        randomness: Randomness | None,
        real_T: Tensor | None,
        document_lengths: list[int] | None,
    ) -> Context:
        """Back-end and dtypes follow the activations, not the weights."""
        batch, count, _ = x_BSH.shape
        start, backend = 0, None
        if cache is not None:
            start = cache.length
            cache.begin(count, document_ids_BS)
        if start == 0:
            config = self.config
            backend, _ = resolve_attention(config.attention, x_BSH.device, x_BSH.dtype, config.head_size)
        table = self._rotary_tables(start, count, x_BSH.device, x_BSH.dtype)
        real = None if real_T is None else RealTokens(real_T, batch, count)
        shape, device = (batch, count), x_BSH.device
        return Context(table, backend, shape, device, document_ids_BS, cache, randomness, real, document_lengths)


class Transformer(nn.Module):
    """The language model. With an `expert_group` of N ranks each holds 1/N of every layer's experts.

    Weights have torch's default values until `init_weights` or a checkpoint sets them; `moe.model.build` builds an
    initialised model on any device. The first forward pass raises UserError when `model.attention` names a back-end
    that can't run on the model's device and dtype.
    """

    def __init__(
        self,
        model: ModelConfig,
        router: RouterConfig,
        experts: ExpertsConfig,
        *,
        expert_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.config = model
        self.base_names: frozenset[str] = frozenset()  # parameters that a checkpoint of this model doesn't hold
        self.model = Decoder(model, router, experts, expert_group)
        self.lm_head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """With `tie_word_embeddings`, makes the head's weight the embedding's; call it again after `to_empty`."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def is_causal(self) -> bool:
        """Whether no token's experts depend on later tokens; text can be generated only then."""
        return all(router.config.is_causal for router in routers_of(self))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def init_weights(self, seed: int) -> None:
        """By `model.initializer`: a function of (seed, parameter name, global expert index) alone."""
        fill_weights(self, self.config, seed)

    def forward(
        self,
        input_ids_BS: Tensor,
        *,
        document_ids_BS: Tensor | None = None,
        labels_BS: Tensor | None = None,
        cache: KVCache | None = None,
        randomness: Randomness | None = None,
        neftune_noise_alpha: float | None = None,
        logits_to_keep: int | None = None,
        real_T: Tensor | None = None,
        document_lengths: list[int] | None = None,
    ) -> ModelOutput:
        """Logits, or the summed loss if labels (already shifted, −100 for no target) are given. `logits_to_keep` is the
        number of last positions whose logits are computed; None: all.

        `document_ids_BS` must not decrease along S; tokens see only their own document (None: a row is one document).
        With a `cache` the tokens continue those of earlier calls and are added to it. In training, dropout, jitter
        and the embeddings' noise (`moe.model.neftune`) take their random numbers from `randomness`. `real_T` (int64,
        ascending) are the places b·S + s of the tokens that sparse layers route; None: all. The others only fill up
        their sequence: they count in no loss, metric or capacity, and their logits mean nothing. `document_lengths`,
        row by row, say what `document_ids_BS` say, without a wait for the GPU to find it out; a pass without them
        counts the ids, where attention needs it.
        """
        x_BSH, routers = self.model(
            input_ids_BS, document_ids_BS, cache, randomness, neftune_noise_alpha, real_T, document_lengths
        )
        if labels_BS is None:
            kept_BSH = x_BSH if logits_to_keep is None else x_BSH[:, -logits_to_keep:]
            return ModelOutput(self.lm_head(kept_BSH), None, routers)
        loss = head_loss(self.lm_head, x_BSH.flatten(0, 1), labels_BS.flatten(), self.config.vocab_size)
        return ModelOutput(None, loss, routers)
