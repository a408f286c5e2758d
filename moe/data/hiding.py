"""Hides the texts of special tokens in a conversation's contents while a template runs, so that it alone makes them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe.data.jinja_sandbox import BEGIN, END
from moe.data.readers import DataError

PRIVATE = range(0xE002, 0xF8FF)  # characters that stand for special tokens in contents
HIDDEN = re.compile("[\ue000-\uf8ff]")


@dataclass(frozen=True, slots=True)
class Hiding:
    """Which character stands for which special token in a conversation's texts."""

    characters: dict[str, str]  # special token → character
    pattern: re.Pattern[str]

    @classmethod
    def of(cls, messages: Any, tools: Any, pattern: re.Pattern[str], place: str) -> Hiding:
        if tools is None and all(message.keys() == {"role", "content"} for message in messages):
            joined = "\0".join(message["content"] for message in messages)
            if pattern.search(joined) is None and (joined.isascii() or HIDDEN.search(joined) is None):
                return cls({}, pattern)
        found: set[str] = set()
        used: set[str] = set()

        def look(text: str) -> str:
            found.update(pattern.findall(text))
            if not text.isascii():
                used.update(HIDDEN.findall(text))
            return text

        _mapped(messages, look)
        _mapped(tools, look)
        if used & {BEGIN, END}:
            raise DataError(
                f"{place}: holds the private character U+E000 or U+E001, which marks answers here: remove it"
            )
        free = (chr(code) for code in PRIVATE if chr(code) not in used)
        return cls(dict(zip(sorted(found), free, strict=False)), pattern)

    def hide(self, value: Any) -> Any:
        if not self.characters:
            return value
        return _mapped(value, lambda text: self.pattern.sub(lambda found: self.characters[found[0]], text))

    def show(self, text: str) -> str:
        for token, character in self.characters.items():
            text = text.replace(character, token)
        return text


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every text in it changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key) if isinstance(key, str) else key: _mapped(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(one, change) for one in value]
    return value
