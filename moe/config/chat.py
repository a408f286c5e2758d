"""`moe chat`: from which checkpoint, with which system prompt, and how answers are picked."""

from __future__ import annotations

from dataclasses import dataclass

from moe.config.choices import Precision, TemplateName
from moe.config.generate import Sampling, check_device
from moe.config.rules import require


@dataclass(kw_only=True, slots=True)
class ChatConfig(Sampling):
    """`checkpoint` is a run directory or one of its checkpoints. `template` is the tokenizer's own, which fine-tuning
    leaves there, or one of ours. `device`, `dtype` and `check_memory` are those of `moe generate`."""

    max_new_tokens: int = 512
    checkpoint: str = ""
    system: str | None = None
    template: TemplateName = TemplateName.tokenizer
    device: str = "auto"
    dtype: Precision = Precision.float32
    check_memory: bool = True

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)  # slots=True creates a new class, in which a bare super() fails
        require(bool(self.checkpoint), "checkpoint='' must name a run directory or one of its checkpoints")
        check_device(self.device)
