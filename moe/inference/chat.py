"""Answers in a conversation: the messages become token ids by the chat template, as they did in training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moe.config import TemplateName
from moe.config.generate import Sampling
from moe.data.chat_template import ChatTemplate, open_template
from moe.data.record_encoding import encode_segments
from moe.data.records import Message
from moe.data.tokenizer_base import Tokenizer
from moe.errors import UserError
from moe.inference.generate import TextPiece, stream
from moe.inference.kept_cache import KeptCache
from moe.model.transformer import Transformer


def conversation(system: str | None, *turns: str) -> list[Message]:
    """Messages whose `turns` are the user's and the assistant's in turn."""
    roles = ("user", "assistant")
    begun = [{"role": "system", "content": system}] if system else []
    return begun + [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]


@dataclass(frozen=True, slots=True)
class Asking:
    """A model and how it is asked: `lead` is the text that its template has between a prompt and an answer, `ends` the
    token behind an answer, if that isn't the end of the sequence."""

    model: Transformer
    tokenizer: Tokenizer
    template: ChatTemplate
    settings: Sampling
    lead: str
    ends: frozenset[int]

    @classmethod
    def of(cls, model: Transformer, tokenizer: Tokenizer, name: TemplateName, settings: Sampling) -> Asking:
        """Raises UserError if the tokenizer has no template, or lacks the tokens of the one that is named."""
        if name is TemplateName.tokenizer and tokenizer.chat_template is None:
            raise UserError(
                "template=tokenizer: the checkpoint's tokenizer has no chat template, so it was not trained on "
                "conversations; template=mistral uses one of ours all the same"
            )
        template = open_template(name, tokenizer)
        lead, end = template.answer_form()
        return cls(model, tokenizer, template, settings, lead, frozenset() if end is None else frozenset((end,)))

    def prompt(self, messages: list[Message]) -> list[int]:
        """Token ids up to where the answer begins. Raises DataError where the template refuses the messages."""
        [(ids_T, _)] = encode_segments([self.template.prompt(messages)], self.tokenizer)
        return ids_T.tolist()

    def answers(
        self, conversations: list[list[Message]], most: int | None = None, kept: KeptCache | None = None
    ) -> Iterator[TextPiece]:
        """The answers as they come, of at most `most` tokens; `kept` is of one conversation. Raises as `stream` and
        `prompt` do."""
        prompts = [self.prompt(messages) for messages in conversations]
        settings = self.settings if most is None else replace(self.settings, max_new_tokens=most)
        begun = [""] * len(prompts)  # what may be the template's lead
        out = [False] * len(prompts)
        for piece in stream(self.model, self.tokenizer, prompts, settings, ends=self.ends, kept=kept):
            text = piece.text
            if not out[piece.prompt]:
                text = begun[piece.prompt] + text
                if self.lead.startswith(text) and text != self.lead and not piece.done:
                    begun[piece.prompt] = text
                    continue
                out[piece.prompt], text = True, text.removeprefix(self.lead)
            yield TextPiece(piece.prompt, text, piece.done)


class Conversation:
    """The messages so far. When they no longer fit the model's positions, the oldest turns are forgotten. Leading
    tokens that are the same as at the last answer are not computed again."""

    def __init__(self, asking: Asking, system: str | None) -> None:
        self._asking, self.system, self._kept = asking, system, KeptCache()
        self.turns: list[str] = []  # the user's and the assistant's in turn

    def messages(self) -> list[Message]:
        return conversation(self.system, *self.turns)

    def reset(self) -> None:
        self.turns = []

    def ask(self, text: str) -> tuple[int, Iterator[str]]:
        """(how many of the oldest turns were forgotten for it, the answer as it comes). The answer is part of the
        conversation as far as it was read. Raises UserError where `text` alone is too long."""
        turns = [*self.turns, text]
        positions = self._asking.model.config.max_position_embeddings
        wanted = min(self._asking.settings.max_new_tokens, positions // 2)
        size = len(self._asking.prompt(conversation(self.system, *turns)))
        while size + wanted > positions and len(turns) > 1:
            turns = turns[2:]
            size = len(self._asking.prompt(conversation(self.system, *turns)))
        if size >= positions:
            raise UserError(
                f"the message has {size} tokens with its template, and the model has model.max_position_embeddings="
                f"{positions}: write a shorter one"
            )
        forgotten, self.turns = len(self.turns) + 1 - len(turns), turns
        return forgotten, self._answer(min(self._asking.settings.max_new_tokens, positions - size))

    def _answer(self, most: int) -> Iterator[str]:
        messages = self.messages()
        self.turns.append("")
        for piece in self._asking.answers([messages], most, self._kept):
            self.turns[-1] += piece.text
            yield piece.text
