"""`moe chat`: a conversation in a terminal, or with the lines of a file.

moe chat checkpoint=runs/chat system='Answer briefly.'
printf 'Hello!\\nAnd now?\\n' | moe chat checkpoint=runs/chat
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from moe.config.chat import ChatConfig
from moe.config.rules import is_utf8
from moe.data.tokenizer_base import Tokenizer
from moe.errors import UserError, shown
from moe.inference.chat import Asking, Conversation, conversation
from moe.model.transformer import Transformer

HELP = """/reset         forget the conversation; the system prompt stays
/system TEXT   another system prompt (none: without TEXT), and a new conversation
/save FILE     append the conversation to FILE as a row of JSONL, which `moe train data=sft` reads
/help          these lines
/quit          end, as Ctrl-D does; Ctrl-C ends an answer"""
PROMPT = "you: "


def run_chat(
    config: ChatConfig, model: Transformer, tokenizer: Tokenizer, lines: TextIO | None = None, out: TextIO | None = None
) -> None:
    """Answers every line until the input ends. Raises UserError if the checkpoint can't chat; an error about one line
    is printed, and the next line is read."""
    source, sink = sys.stdin if lines is None else lines, sys.stdout if out is None else out
    if isinstance(source, io.TextIOWrapper):
        source.reconfigure(errors="surrogateescape")  # a byte that can't be decoded makes only its own line fail
    talk = Conversation(Asking.of(model, tokenizer, config.template, config), config.system)
    people = source is sys.stdin and source.isatty()
    if people:
        print("/help lists the commands, Ctrl-D ends", file=sink)
    for line in _typed(sink) if people else source:
        text = line.rstrip("\r\n")
        try:
            is_utf8("the line ", text)
            if text.startswith("/"):
                if not _command(talk, text, sink):
                    return
            elif text.strip():
                _answer(talk, text, sink)
        except UserError as error:
            print(f"moe: {error}", file=sys.stderr, flush=True)


def _typed(sink: TextIO) -> Iterator[str]:
    """Lines from the keyboard, with editing where Python has it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (changes what input() does)
    while True:
        try:
            yield input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            print(file=sink)
            return


def _answer(talk: Conversation, text: str, sink: TextIO) -> None:
    forgotten, pieces = talk.ask(text)
    if forgotten:
        print(
            f"(the conversation is too long for the model: its {forgotten} oldest turns are forgotten)", file=sys.stderr
        )
    try:
        for piece in pieces:
            sink.write(piece)
            sink.flush()
    except KeyboardInterrupt:
        sink.write(" …")
    sink.write("\n")
    sink.flush()


def _command(talk: Conversation, text: str, sink: TextIO) -> bool:
    """Does what the line says; False: ends. Raises UserError."""
    name, _, argument = text.partition(" ")
    match name:
        case "/quit" | "/exit":
            return False
        case "/help":
            print(HELP, file=sink)
        case "/reset":
            talk.reset()
        case "/system":
            talk.system = argument.strip() or None
            talk.reset()
        case "/save":
            _save(talk, argument.strip())
        case _:
            raise UserError(f"{shown(name)}: no such command; /help lists them")
    return True


def _save(talk: Conversation, name: str) -> None:
    if not name:
        raise UserError("/save must be followed by a file, as in /save chat.jsonl")
    if not talk.turns:
        raise UserError(f"/save {shown(name)}: the conversation is empty")
    # Training refuses an empty answer: the model ended at once, or Ctrl-C came before its first word.
    pairs = list(zip(talk.turns[::2], talk.turns[1::2], strict=False))
    answered = [pair for pair in pairs if pair[1].strip()]
    if not answered:
        raise UserError(f"/save {shown(name)}: no answer has any text")
    path = Path(name).expanduser()
    messages = conversation(talk.system, *itertools.chain(*answered))
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except (OSError, RuntimeError) as error:
        raise UserError(f"/save {shown(name)}: can't be written: {getattr(error, 'strerror', error)}") from error
    empty = len(pairs) - len(answered)
    print(
        f"(saved to {path}{f'; left out, as their answers are empty: {empty} turns' if empty else ''})", file=sys.stderr
    )
