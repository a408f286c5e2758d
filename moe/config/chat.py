"""`moe chat`: from which checkpoint, with which system prompt, and how answers are picked."""

from __future__ import annotations

from dataclasses import dataclass

from moe.config.generate import Answering


@dataclass(kw_only=True, slots=True)
class ChatConfig(Answering):
    """The keys of `moe chat`: by default answers may be longer than a continuation by `moe generate`."""

    max_new_tokens: int = 512
