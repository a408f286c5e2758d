"""Models and configurations that several stages use, in full size and in a dry run's."""

from __future__ import annotations

import torch

from moe.config import Config
from moe.config.compose import load_config
from moe.model.build import empty_model
from moe.model.transformer import Transformer

LOCAL = ["tracking=none"]
# 3.1 B parameters, 0.98 B active; 16,384 tokens a micro-batch.
THREE_BILLION = [
    "model.vocab_size=32000", "model.hidden_size=2048", "model.intermediate_size=4096", "model.num_hidden_layers=14",
    "model.num_attention_heads=16", "model.num_key_value_heads=4", "model.head_dim=128", "train.sequence_length=4096",
    "train.micro_batch_size=4",
]  # fmt: skip
TINY = [
    "model.vocab_size=320", "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=2",
    "model.num_attention_heads=4", "model.num_key_value_heads=2", "model.head_dim=8", "train.sequence_length=32",
    "train.micro_batch_size=2",
]  # fmt: skip


def step_overrides(*, dry_run: bool, micro_batches: int = 1) -> list[str]:
    """Overrides of `moe train` for the bfloat16 training step that stages measure."""
    size, batch = (TINY, 2) if dry_run else (THREE_BILLION, 4)
    overrides = ["model=small", "tokenizer.vocab_size=300", "train.precision=bfloat16"]
    return [*overrides, *LOCAL, *size, f"train.global_batch_size={batch * micro_batches}"]


def on_device(config: Config, device: torch.device, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model with weights drawn on the device: N(0, initializer_range²), norms 1.

    NOTE: not by `init_weights`, which draws on the CPU, for the same weights on every device, and takes minutes for
    billions of them.
    """
    model = empty_model(config, device)
    generator = torch.Generator(device).manual_seed(config.train.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, config.model.initializer_range, generator=generator)
            else:
                parameter.fill_(1.0)
    return model.to(dtype)


def one_layer(extra: list[str], *, dry_run: bool) -> Config:
    """Mixtral 8x7B's shape (or a tiny one) with a single layer and a small vocabulary."""
    size = [*TINY, "model.num_hidden_layers=1"] if dry_run else ["model.num_hidden_layers=1", "model.vocab_size=512"]
    return load_config(["model=mixtral_8x7b", "tokenizer.vocab_size=300", *LOCAL, *size, *extra])
