"""A conversation as segments of text and special tokens, by a Jinja template; and which of them the model writes.

Special tokens come from the template alone: where a message's content holds one's text, it is replaced while the
template runs, by a character that the conversation doesn't have, and put back as text.

What the model writes is what the template puts between {% generation %} and {% endgeneration %}. A template without
these marks is rendered up to each assistant turn, with the prompt for an answer: what the whole has behind that is
written by the model, up to the end of the turn.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jinja2
import jinja2.meta

from moe.config import TemplateName
from moe.data.chat_templates import NEEDED_TOKENS, OURS
from moe.data.hiding import Hiding
from moe.data.jinja_sandbox import BEGIN, END, Sandbox, trusted_template
from moe.data.readers import DataError, first_line
from moe.data.records import Message
from moe.data.tokenizer_base import Tokenizer
from moe.errors import shown

LARGEST = 1 << 18  # characters of a template; the largest published ones have about 20,000
NEITHER = (False, False)  # sides
UNKNOWN = {"pad_token", "unk_token", "sep_token", "cls_token", "mask_token", "additional_special_tokens"}


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text, or the special token `token`. `turn`: which of the conversation's assistant turns it belongs
    to, counted from 0; −1: none, the model doesn't write it."""

    text: str
    token: int | None = None
    turn: int = -1


class ChatTemplate:
    """A compiled template for one tokenizer. `name` is for messages."""

    def __init__(self, source: str, tokenizer: Tokenizer, name: str) -> None:
        """Raises DataError for what is no template."""
        if len(source) > LARGEST:
            raise DataError(f"{name}: has {len(source):,} characters, and at most {LARGEST:,} are read")
        self.source, self.name, self._tokenizer = source, name, tokenizer
        self._specials = tokenizer.special_tokens()
        texts = sorted(filter(None, self._specials), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
        by_id = {token: text for text, token in self._specials.items()}
        self._names = {"eos_token": by_id.get(tokenizer.eos_id, "")}
        ours = source in OURS.values()
        has_bos = tokenizer.has_bos or ours
        self._names["bos_token"] = by_id.get(tokenizer.bos_id, "") if has_bos else ""
        sandbox = Sandbox()
        self._budget = sandbox.budget
        try:
            self._template = trusted_template(source) if ours else sandbox.compiled(source)
            variables = jinja2.meta.find_undeclared_variables(sandbox.parse(source))
        except Exception as error:  # Jinja's own, and Python's of a code that is nested too deeply
            raise DataError(f"{name}: not a template that can be read: {first_line(error)}") from error
        self._unknown = [] if ours else sorted(variables & UNKNOWN)
        self._stripping = {} if ours else tokenizer.stripping
        self._knows_tools = "tools" in variables
        self._marks = bool(re.search(r"\{%[-+]?\s*generation\b", source))

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, (self.source, self._tokenizer, self.name)

    def segments(self, messages: list[Message], tools: list[Any] | None, place: str) -> list[Segment]:
        """The conversation. Raises DataError, naming the place, where the template refuses it, leaves out a part, or
        has transformers make other tokens."""
        segments = self._segments(messages, tools, place)
        self._check_tokens(segments, place)
        return segments

    def _segments(self, messages: list[Message], tools: list[Any] | None, place: str) -> list[Segment]:
        if tools and not self._knows_tools:
            raise DataError(
                f"{place}: has tools, and {self.name} has no place for them: leave them out, or use another"
            )
        hiding = Hiding.of(messages, tools, self._pattern, place)
        hidden, hidden_tools = hiding.hide(messages), hiding.hide(tools)
        text = self._render(hidden, hidden_tools, place)
        self._check_nothing_is_lost(hidden, hidden_tools, text, place)
        text, spans = self._turns(hidden, hidden_tools, text, place)
        if not spans:
            raise DataError(f"{place}: {self.name} marks nothing that the model writes: use another template")
        return self._cut(text, spans, hiding)

    def prompt(self, messages: list[Message], place: str = "the conversation") -> list[Segment]:
        """The conversation up to where the model answers. Raises as `segments` does."""
        hiding = Hiding.of(messages, None, self._pattern, place)
        hidden = hiding.hide(messages)
        text = self._render(hidden, None, place, answer=True)
        self._check_nothing_is_lost(hidden, None, text, place)
        segments = self._cut(*self._turns(hidden, None, text, place), hiding)
        self._check_tokens(segments, place)
        return segments

    def _check_tokens(self, segments: list[Segment], place: str) -> None:
        if self._unknown:
            raise DataError(
                f"{place}: {self.name} writes {self._unknown[0]}, and only bos_token and eos_token are known: use "
                "another template"
            )
        for before, after in pairwise(segments):
            for token, text, side in ((before, after.text[:1], 1), (after, before.text[-1:], 0)):
                if token.token is not None and text.isspace() and self._stripping.get(token.text, NEITHER)[side]:
                    raise DataError(
                        f"{place}: {self.name} writes a space beside {shown(token.text)}, which removes it in "
                        "transformers (lstrip or rstrip in tokenizer.json), and not here: use another template"
                    )

    def answer_form(self) -> tuple[str, int | None]:
        """What the model writes around an answer: the text before it, and the special token that ends it (None: only
        the end of the sequence)."""
        question, answer = {"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}
        own = [one for one in self._segments([question, answer], None, "an example of two turns") if one.turn == 0]
        text = next((one.text for one in own if one.token is None), "")
        return text.partition("because")[0], own[-1].token

    def _render(self, messages: Any, tools: Any, place: str, *, answer: bool = False) -> str:
        size = sum(len(message.get("content") or "") for message in messages) + (len(json.dumps(tools)) if tools else 0)
        self._budget.refill(len(messages), size)
        try:
            return self._template.render(messages=messages, tools=tools, add_generation_prompt=answer, **self._names)
        except RecursionError as error:
            raise DataError(f"{place}: {self.name} doesn't end") from error
        except Exception as error:  # a template can raise whatever Python raises
            raise DataError(f"{place}: {self.name}: {first_line(error)}") from error

    def _check_nothing_is_lost(self, messages: list[Message], tools: Any, text: str, place: str) -> None:
        """Each part of a message must be in `text` as often as in all messages and the tools' names: that another one
        has it too isn't enough."""
        every = [_parts(message, number == len(messages) - 1) for number, message in enumerate(messages)]
        there = [*map(_tool_name, tools or ()), *(part for parts in every for part in parts)]
        if _in_order(there, text):
            return
        joined = BEGIN.join(there)
        for number, (message, parts) in enumerate(zip(messages, every, strict=True)):
            lost = next((part for part in parts if part and text.count(part) < joined.count(part)), None)
            if lost is not None:
                raise DataError(
                    f"{place}: {self.name} leaves out what message {number} ({message['role']}) has, {shown(lost)!r}: "
                    "remove the message, or use another template"
                )

    def _turns(self, messages: list[Message], tools: Any, text: str, place: str) -> tuple[str, list[tuple[int, int]]]:
        """`text` without marks, and the (start, end) in it of each assistant turn."""
        return _unmarked(text) if self._marks else (text, self._spans(messages, tools, text, place))

    def _spans(self, messages: list[Message], tools: Any, text: str, place: str) -> list[tuple[int, int]]:
        """(start, end) in `text` of each assistant turn; consecutive ones are one."""
        spans = list[tuple[int, int]]()
        roles = [message["role"] for message in messages]
        for number, role in enumerate(roles):
            if role != "assistant" or (number and roles[number - 1] == "assistant"):
                continue
            last = next((i for i in range(number, len(roles)) if roles[i] != "assistant"), len(roles))
            before = self._render(messages[:number], tools, place, answer=True) if number else ""
            through = text if last == len(roles) else self._render(messages[:last], tools, place)
            found = self._span(text, before, through)
            parts = _kept(messages[last - 1], last == len(roles))
            overlaps = found is not None and spans and found[0] < spans[-1][1]
            if found is None or overlaps or any(part not in text[slice(*found)] for part in parts):
                raise DataError(
                    f"{place}: {self.name} writes earlier turns in another way than the answer to a prompt, so where "
                    "the answer begins can't be told: mark it with {% generation %}, or use another template"
                )
            spans.append(found)
        return spans

    def _span(self, text: str, before: str, through: str) -> tuple[int, int] | None:
        """What `text` has behind the prompt `before`, through the end of the turn: its last special token, if only
        spaces follow it. A special token that ends `through`, but not the turn in `text`, ends conversations and no
        turn. A template that writes later turns differently (`through` isn't how `text` begins) ends the turn at its
        first special token."""
        if not text.startswith(before):
            return None
        start = len(before)
        if not text.startswith(through):
            last = next(reversed([*self._pattern.finditer(through, start)]), None)
            if last and not through[last.end() :].strip() and text.startswith(through[: last.start()]):
                through = through[: last.start()]
            else:
                first = self._pattern.search(text, start)
                return (start, first.end()) if first else None
        ends = [found.end() for found in self._pattern.finditer(text, start, len(through))]
        return (start, ends[-1]) if ends and not through[ends[-1] :].strip() else (start, len(through))

    def _cut(self, text: str, spans: list[tuple[int, int]], hiding: Hiding) -> list[Segment]:
        segments: list[Segment] = []

        def add(start: int, stop: int, turn: int) -> None:
            at = start
            for found in self._pattern.finditer(text, start, stop):
                if found.start() > at:
                    segments.append(Segment(hiding.show(text[at : found.start()]), None, turn))
                segments.append(Segment(found[0], self._specials[found[0]], turn))
                at = found.end()
            if stop > at:
                segments.append(Segment(hiding.show(text[at:stop]), None, turn))

        at = 0
        for turn, (start, stop) in enumerate(spans):
            add(at, start, -1)
            add(start, stop, turn)
            at = stop
        add(at, len(text), -1)
        return segments


def _kept(message: Message, is_last: bool) -> list[str]:
    """The parts of a message's content that a template must not leave out: all, but what the model thought in earlier
    turns. The marks of a thought are the template's own."""
    content = message.get("content") or ""
    if message["role"] != "assistant":
        return [content.strip()]
    thoughts, _, said = content.rpartition("</think>")
    parts = [*re.split("</?think>", thoughts), said] if is_last else [said]
    return [part.strip() for part in parts]


def _parts(message: Message, is_last: bool) -> list[str]:
    """What a template must write of a message: the parts of its content, and the names of the tools that it calls."""
    return [*_kept(message, is_last), *map(_tool_name, message.get("tool_calls") or ())]


def _tool_name(tool: Any) -> str:
    """That of a tool, or of the one that a call is for."""
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    return str(inner.get("name", "")) if isinstance(inner, dict) else ""


def _in_order(parts: list[str], text: str) -> bool:
    """Whether `text` has the parts one behind the other: the usual case, told in one pass."""
    at = 0
    for part in parts:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """`text` without BEGIN and END, and what was between them."""
    spans, parts, length = [], list[str](), 0
    for part in text.split(BEGIN):
        inside, ended, outside = part.partition(END)
        if ended:
            spans.append((length, length + len(inside)))
        parts += [inside, outside]
        length += len(inside) + len(outside)
    return "".join(parts), spans


def open_template(name: TemplateName, tokenizer: Tokenizer) -> ChatTemplate:
    """The template `data.template=NAME` for this tokenizer. Raises DataError."""
    if name is TemplateName.auto:
        name = TemplateName.mistral if tokenizer.chat_template is None else TemplateName.tokenizer
    if name is TemplateName.tokenizer:
        if tokenizer.chat_template is None:
            raise DataError(
                "data.template=tokenizer: the tokenizer has no chat template: choose one of ours, as in "
                "data.template=mistral"
            )
        return ChatTemplate(tokenizer.chat_template, tokenizer, "the tokenizer's chat template")
    specials = tokenizer.special_tokens()
    missing = [token for token in NEEDED_TOKENS.get(name, ()) if token not in specials]
    if missing:
        raise DataError(
            f"data.template={name.name} needs the tokens {', '.join(missing)}, which the tokenizer doesn't have: "
            f"'tokenizer.add_special_tokens=[{','.join(missing)}]' adds them, data.template=mistral needs none"
        )
    return ChatTemplate(OURS[name], tokenizer, f"data.template={name.name}")
