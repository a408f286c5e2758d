"""`moe generate`: how the next token is picked, from which checkpoint, and after which prompts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moe.config.rules import filled, require


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
        for name in ("max_new_tokens", "prefill_chunk", "top_k"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value} must be ≥ 1")
        for name in ("temperature", "seed"):
            require(0 <= getattr(self, name) < float("inf"), f"{name}={getattr(self, name)} must be ≥ 0")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]")
        require(0 < self.repetition_penalty < float("inf"), f"repetition_penalty={self.repetition_penalty} must be > 0")
        require(self.stop != "", "stop='' must have a character: null means no stop text")


@dataclass(kw_only=True, slots=True)
class GenerateConfig(Sampling):
    """`checkpoint` is a run directory or one of its checkpoints; `prompts_file` has one prompt a line (UTF-8)."""

    checkpoint: str = ""
    prompt: str | None = None
    prompts_file: str | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)  # super() doesn't work in a class that slots=True made anew
        require(bool(self.checkpoint), "checkpoint='' must name a run directory or one of its checkpoints")
        filled("", self, "prompts_file")
        given = (self.prompt is not None) + (self.prompts_file is not None)
        require(
            given == 1, f"prompt={self.prompt} and prompts_file={self.prompts_file}: exactly one of them must be set"
        )
        require(self.batch_size >= 1, f"batch_size={self.batch_size} must be ≥ 1")


def quote_texts(overrides: list[str]) -> list[str]:
    """Command-line overrides with `prompt=` and `stop=` quoted for Hydra, so that they arrive as they were typed.

    Unquoted, Hydra trims `prompt=def ` and refuses `prompt=Once, twice`. What is already in quotes, and `null`, stays.
    """
    return [_quoted(override) if override.startswith(("prompt=", "stop=")) else override for override in overrides]


def _quoted(override: str) -> str:
    key, _, value = override.partition("=")
    already = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if already or value == "null":
        return override
    # In Hydra's quotes a backslash counts before a quote only, in OmegaConf's text before an interpolation only.
    value = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", r"\'")
    value = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return f"{key}='{value}'"
