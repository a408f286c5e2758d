"""Generates text: a batch of prompts, a rolling cache, and the usual ways to pick the next token.

Prompts of different lengths are padded on the left; the padding is a document of its own, which no prompt sees. A
prompt's random numbers come from (seed, its index), so its text depends on no other prompt.
Legend: B prompts, P longest prompt, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.config.generate import Sampling
from moe.config.rules import require
from moe.data.tokenizer_base import Tokenizer
from moe.errors import UserError
from moe.inference.decoding import IncrementalDecoder
from moe.inference.kept_cache import KeptCache
from moe.inference.lean_decoder import open_decoder
from moe.inference.sampling import pick
from moe.model.cache import KVCache
from moe.model.transformer import Transformer


class NotFiniteError(UserError):
    """A model whose logits are NaN or infinite gives no text."""


@dataclass(slots=True)
class TextPiece:
    """A stretch of one prompt's continuation, ready to be shown: whole characters, never part of the stop text."""

    prompt: int
    text: str
    done: bool


def generate(model: Transformer, tokenizer: Tokenizer, prompts: list[str], settings: Sampling) -> list[str]:
    """The prompts' continuations (without the prompts)."""
    texts = [""] * len(prompts)
    for piece in stream(model, tokenizer, prompts, settings):
        texts[piece.prompt] += piece.text
    return texts


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str | list[int]],
    settings: Sampling,
    *,
    ends: frozenset[int] = frozenset(),
    all_steps: bool = False,
    joined: bool = True,
    kept: KeptCache | None = None,
) -> Generator[TextPiece, None, None]:
    """The continuations as they come. Raises UserError when the tokenizer or the lengths don't fit the model, and
    NotFiniteError.

    A prompt is a text, which begins a document, or the token ids of a beginning; the tokens of `ends` end a text too.
    `all_steps` makes exactly `max_new_tokens` passes even when every text has ended: ranks that share experts must pass
    equally often, and rounding could make one rank's text end before another's. Unless `joined`, a continuation is
    decoded as a text of its own: some tokenizers then leave out the space before it. With `kept`, which takes one
    prompt, only tokens that differ from its last text's are computed.
    """
    config = model.config
    require(
        model.is_causal,
        "this model's routers (router.kind=expert_choice) choose a token's experts by what follows it too: no text can "
        "be generated; `moe train` evaluates it",
    )
    require(
        tokenizer.vocab_size <= config.vocab_size,
        f"the tokenizer's {tokenizer.vocab_size} pieces must be ≤ model.vocab_size={config.vocab_size}",
    )
    ends |= {tokenizer.eos_id}
    texts = [_Text(tokenizer, index, prompt, settings, ends, joined) for index, prompt in enumerate(prompts)]
    width = max(len(text.ids) for text in texts)
    total = width + settings.max_new_tokens
    require(
        total <= config.max_position_embeddings,
        f"{width} prompt tokens + max_new_tokens={settings.max_new_tokens} must be ≤ "
        f"model.max_position_embeddings={config.max_position_embeddings}",
    )
    if kept is None:
        cache = KVCache(config, len(texts), total, model.device, model.dtype)
    else:
        cache = kept.begin(model, texts[0].ids, total)
    was_training, fed = model.training, list(texts[0].ids)
    model.eval()
    try:
        prompt_ids = [text.ids[cache.length :] for text in texts]
        decoder = open_decoder(model, cache)
        logits_BV = decoder.prefill(prompt_ids, settings.prefill_chunk, tokenizer.bos_id)
        for step in range(settings.max_new_tokens):
            rows_BV = logits_BV[:, : tokenizer.vocab_size].float().cpu()
            if not rows_BV.isfinite().all():
                raise NotFiniteError(
                    "the model's logits are not finite: its weights hold NaN, infinity or numbers too large for "
                    f"{str(model.dtype).removeprefix('torch.')}; use another checkpoint"
                )
            if settings.temperature == 0 and settings.repetition_penalty == 1:  # `pick` of all at once
                chosen = rows_BV.argmax(-1).tolist()
            else:
                chosen = [text.choose(logits_V) for text, logits_V in zip(texts, rows_BV, strict=True)]
            last = step == settings.max_new_tokens - 1
            for text, token in zip(texts, chosen, strict=True):
                if not text.done and (piece := text.add(token, last)) is not None:
                    yield piece
            if last or (not all_steps and all(text.done for text in texts)):
                return
            logits_BV = decoder.step(chosen)
            fed.append(chosen[0])
    finally:
        model.train(was_training)
        if kept is not None and cache.length:
            kept.end(cache, fed)


class _Text:
    """One prompt and its continuation so far."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        index: int,
        prompt: str | list[int],
        settings: Sampling,
        ends: frozenset[int],
        joined: bool,
    ) -> None:
        self.index, self.settings, self.ends = index, settings, ends
        prompt_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        self.ids = [tokenizer.bos_id, *prompt_ids] if isinstance(prompt, str) else prompt
        self.seen = set(self.ids)
        self.decoder = IncrementalDecoder(tokenizer, prompt_ids if joined else [])
        self.held_back, self.done = "", False  # the end of the text, which may be the beginning of the stop text
        digest = hashlib.sha256(f"{settings.seed}/{index}".encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))

    def choose(self, logits_V: Tensor) -> int:
        return pick(logits_V, self.seen, self.settings, self.generator)

    def add(self, token: int, last: bool) -> TextPiece | None:
        """Appends the next token; returns the text that can be shown now."""
        self.done = last or token in self.ends
        text = self.held_back
        if token not in self.ends:
            self.seen.add(token)
            text += self.decoder.add(token)
        if self.done:
            text += self.decoder.end()
        stop = self.settings.stop
        if stop is not None and (at := text.find(stop)) >= 0:
            self.done, text = True, text[:at]
        end = len(text) if self.done else len(text) - _begun(text, stop)
        self.held_back = text[end:]
        return TextPiece(self.index, text[:end], self.done) if self.done or end else None


def _begun(text: str, stop: str | None) -> int:
    """Characters at the end of `text` that the stop text begins with."""
    if stop is None:
        return 0
    return next((size for size in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def sample_text(model: Transformer, tokenizer: Tokenizer, prompt: str, tokens: int) -> str:
    """The greedy continuation of `prompt`, to look at while training; of its end alone where the model has too few
    positions for all of it. Ranks that share experts call it together."""
    settings = Sampling(max_new_tokens=tokens, temperature=0.0)
    room = model.config.max_position_embeddings - tokens
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    fitting = prompt if len(ids) <= room else ids[-room:]
    return "".join(piece.text for piece in stream(model, tokenizer, [fitting], settings, all_steps=True))
