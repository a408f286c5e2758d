"""The backbone and its experts."""

from __future__ import annotations

from dataclasses import dataclass

from moe.config.choices import AttentionBackend, ExpertBackend, Mlp, Recompute
from moe.config.rules import positive, require, share


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The backbone. `head_dim=None`: hidden_size / num_attention_heads; `sliding_window=None`: full attention.

    Unless a preset or override sets `vocab_size`, composing sets it to the tokenizer's vocabulary size, if that is
    known. `hidden_dropout` applies to the outputs of attention and MLP before they are added to the residual stream, in
    training only.
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
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    hidden_dropout: float = 0.0
    mlp: Mlp = Mlp.sparse
    attention: AttentionBackend = AttentionBackend.auto
    recompute: Recompute = Recompute.none

    def __post_init__(self) -> None:
        positive("model", self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
        positive("model", self, "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        positive("model", self, "rope_theta", "rms_norm_eps", "initializer_range")
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

    @property
    def head_size(self) -> int:
        """Dimensions of one head. NOTE: not stored in `head_dim`: the schema is an instance of this class, so every
        model whose YAML leaves head_dim out would inherit the default model's value."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim


@dataclass(kw_only=True, slots=True)
class ExpertsConfig:
    backend: ExpertBackend = ExpertBackend.auto
