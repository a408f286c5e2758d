"""`moe generate`: how the next token is picked, from which checkpoint, and after which prompts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moe.config.choices import Precision, TemplateName
from moe.config.rules import MAX_REAL, filled, is_seed, is_utf8, positive, require


@dataclass(kw_only=True, slots=True)
class Sampling:
    """How the next token is picked and when to stop.

    `temperature=0` takes the most probable token. `top_k=null` and `top_p=1` keep all; `repetition_penalty` divides the
    positive logits of tokens already in the text and multiplies the negative ones (arXiv 1909.05858, §4.1). Text ends
    at the end-of-document token, before `stop`, or after `max_new_tokens`. `prefill_chunk` bounds the prompt tokens per
    forward pass, and so the memory that a long prompt takes.
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: str | None = None
    seed: int = 0
    prefill_chunk: int = 512

    def __post_init__(self) -> None:
        positive("", self, "max_new_tokens", "prefill_chunk", "top_k", "repetition_penalty")
        is_seed("", self, "seed")
        # No lower bound: a temperature below float32's range acts like 0.
        require(self.temperature >= 0, f"temperature={self.temperature} must be ≥ 0")
        require(self.temperature <= MAX_REAL, f"temperature={self.temperature} must be ≤ {MAX_REAL:g}")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]")
        require(self.stop != "", "stop='' must have a character: null means no stop text")
        is_utf8("stop=", self.stop)


def check_source(checkpoint: str, device: str) -> None:
    """Raises UserError unless a checkpoint is named, and the device is one that `choose_device` knows."""
    require(bool(checkpoint.strip()), "checkpoint='' must name a run directory or one of its checkpoints")
    known = re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device)
    require(known is not None, f"device={device} must be auto, cpu, cuda or cuda:N")


@dataclass(kw_only=True, slots=True)
class Answering(Sampling):
    """`checkpoint` is a run directory or one of its checkpoints. In a conversation `system` is the system prompt, and
    `template` the tokenizer's own, which fine-tuning leaves there, or one of ours.

    `device` is `cpu`, `cuda`, `cuda:N`, or `auto`: the GPU where there is one. `dtype` is that of weights, activations
    and cache; the router and the choice of a token stay float32. `check_memory=false` loads a model even if it is
    larger than the available memory.
    """

    checkpoint: str = ""
    system: str | None = None
    template: TemplateName = TemplateName.tokenizer
    device: str = "auto"
    dtype: Precision = Precision.float32
    check_memory: bool = True

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)  # slots=True creates a new class, in which a bare super() fails
        check_source(self.checkpoint, self.device)
        is_utf8("system=", self.system)


@dataclass(kw_only=True, slots=True)
class GenerateConfig(Answering):
    """`prompts_file` has one prompt a line (UTF-8). With `chat` a prompt is a message, which the model answers."""

    prompt: str | None = None
    prompts_file: str | None = None
    chat: bool = False
    batch_size: int = 8

    def __post_init__(self) -> None:
        Answering.__post_init__(self)
        filled("", self, "prompts_file")
        is_utf8("prompt=", self.prompt)
        given = (self.prompt is not None) + (self.prompts_file is not None)
        require(
            given == 1, f"prompt={self.prompt} and prompts_file={self.prompts_file}: exactly one of them must be set"
        )
        positive("", self, "batch_size")
        for name, value, default in (
            ("system", self.system, None),
            ("template", self.template, TemplateName.tokenizer),
        ):
            require(self.chat or value == default, f"{name}={getattr(value, 'name', value)} needs chat=true")
