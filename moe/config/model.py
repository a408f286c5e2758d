"""The backbone and its experts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moe.config.choices import AttentionBackend, ExpertBackend, Initializer, Mlp, QkNorm, Recompute
from moe.config.rope import check_rope_scaling
from moe.config.rules import default_of, not_negative, positive, require, share

MOST_CHUNKS = 8  # of a layer's exchange


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The backbone. `head_dim=None`: hidden_size / num_attention_heads; `sliding_window=None`: full attention.

    Unless a preset or override sets `vocab_size`, composing sets it to the tokenizer's vocabulary size, if that is
    known. `hidden_dropout` applies to the outputs of attention and MLP before they are added to the residual stream, in
    training only. `initializer_range` is the standard deviation that initializer=normal and depth_scaled start from.

    `rope_scaling` is Hugging Face's: {} rotates by position · rope_theta^(−2i/D), and {rope_type: llama3 or yarn, …}
    changes the frequencies (`moe.kernels.rope_scaling`).

    With `mlp=sparse`, `sparse_layers` says which layers have a router: `all`, `every_N` (each N-th, the N-th first), or
    a list counted from 0; the others have a dense MLP of `intermediate_size`. An expert has `moe_intermediate_size`
    (None: `intermediate_size`); every token also uses a dense MLP of `n_shared_experts` times that, if there are any.
    """

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    qk_norm: QkNorm = QkNorm.none
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    initializer: Initializer = Initializer.equal_output
    initializer_range: float = 0.02
    hidden_dropout: float = 0.0
    mlp: Mlp = Mlp.sparse
    sparse_layers: Any = "all"
    moe_intermediate_size: int | None = None
    n_shared_experts: int = 0
    attention: AttentionBackend = AttentionBackend.auto
    recompute: Recompute = Recompute.none

    def __post_init__(self) -> None:
        positive("model", self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
        positive("model", self, "moe_intermediate_size")
        not_negative("model", self, "n_shared_experts")
        positive("model", self, "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        positive("model", self, "rope_theta", "rms_norm_eps", "initializer_range")
        require(
            self.initializer in (Initializer.normal, Initializer.depth_scaled)
            or self.initializer_range == default_of(self, "initializer_range"),
            f"model.initializer_range={self.initializer_range} has no effect with model.initializer="
            f"{self.initializer.name}: add model.initializer=normal (or depth_scaled)",
        )
        share("model", self, "hidden_dropout")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        require(
            heads % kv_heads == 0,
            f"model.num_attention_heads={heads} must be divisible by model.num_key_value_heads={kv_heads}",
        )
        require(
            self.head_dim is not None or self.hidden_size % heads == 0,
            f"model.hidden_size={self.hidden_size} must be divisible by model.num_attention_heads={heads}, "
            "or model.head_dim set",
        )
        require(self.head_size % 2 == 0, f"model.head_dim={self.head_size} must be even: RoPE rotates pairs")
        window = self.sliding_window
        require(
            window is None or window >= 1,
            f"model.sliding_window={window} must be ≥ 1: it counts the query's own key (null means full attention)",
        )
        positive("model", self, "sliding_window")
        check_rope_scaling("model.rope_scaling", self.rope_scaling)
        require(
            self.rope_scaling.get("rope_type") != "yarn" or self.rope_theta > 1,
            f"model.rope_theta={self.rope_theta} must be > 1 for model.rope_scaling.rope_type=yarn",
        )
        self._check_sparse_layers()

    def _check_sparse_layers(self) -> None:
        stated, layers = self.sparse_layers, self.num_hidden_layers
        key = f"model.sparse_layers={stated}"
        if isinstance(stated, list):
            numbers = all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < layers for one in stated)
            require(
                bool(stated) and numbers and len(set(stated)) == len(stated),
                f"{key} must name layers from 0 to {layers - 1}, each once; model.mlp=dense has no sparse layer",
            )
            return
        every = re.fullmatch(r"all|every_([1-9]\d{0,8})", str(stated))
        require(every is not None, f"{key} must be all, every_N as in every_2, or a list of layers as in [1,3]")
        assert every is not None
        require(int(every[1] or 1) <= layers, f"{key} must be ≤ every_{layers}: no layer of {layers} would be sparse")

    @property
    def sparse_layer_numbers(self) -> Sequence[int]:
        """The layers that have a router, in order, counted from 0."""
        if self.mlp is Mlp.dense:
            return range(0)
        if isinstance(self.sparse_layers, list):
            return sorted(self.sparse_layers)
        every = int(self.sparse_layers.partition("_")[2] or 1)
        return range(every - 1, self.num_hidden_layers, every)

    @property
    def expert_size(self) -> int:
        """Width of one expert's feed-forward."""
        return self.intermediate_size if self.moe_intermediate_size is None else self.moe_intermediate_size

    @property
    def shared_size(self) -> int:
        """Width of the experts that every token uses, as one MLP; 0 where there are none."""
        return self.n_shared_experts * self.expert_size

    @property
    def head_size(self) -> int:
        """Dimensions of one head. NOTE: not stored in `head_dim`: the schema is an instance of this class, so every
        model whose YAML leaves head_dim out would inherit the default model's value."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim


FP8_MULTIPLE = 16  # of the elements of a vector of float8 factors: 16 bytes


@dataclass(kw_only=True, slots=True)
class ExpertsConfig:
    """With expert parallelism a layer's tokens are exchanged in `exchange_chunks` parts, at most 8: while one part's
    rows travel, the experts compute another's (docs/parallelism.md). With `fp8` the products of rows and weights have
    float8 factors in training (docs/performance.md).

    With expert parallelism and `two_batch_overlap`, each layer takes the two halves of a micro-batch in turn: while
    one's rows travel, the other's attention or experts are computed."""

    backend: ExpertBackend = ExpertBackend.auto
    exchange_chunks: int = 1
    two_batch_overlap: bool = False
    fp8: bool = False

    def __post_init__(self) -> None:
        require(
            not self.fp8 or self.backend in (ExpertBackend.auto, ExpertBackend.grouped_mm),
            f"experts.fp8=true has no experts.backend={self.backend.name}: use experts.backend=auto",
        )
        positive("experts", self, "exchange_chunks", at_most=MOST_CHUNKS)

    @property
    def exchanges(self) -> int:
        """Parts in which a layer's rows are exchanged between ranks, one after the other."""
        return self.exchange_chunks * (2 if self.two_batch_overlap else 1)
