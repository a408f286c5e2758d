"""Odd values, and content with changed bytes or values."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

ODD = [
    "", " ", "0", "-1", "1e308", "-1e308", "nan", "inf", "1e-320", str(2**63), str(2**64), "9" * 6000, "null", "true",
    "[]", "{}", "[1,2", "'", '"', "\\", "${x}", "${oc.env:HOME}", "a,b", "(", "é", "日本", "\u202e", "a b", "../..",
    "/", "/dev/zero", "/dev/null", "~", "*", "$(id)", "x" * 5000, "\ud800", "a=b", "1_000", "0x10", "+5", "None", "\t",
]  # fmt: skip


def odd(random_: random.Random) -> str:
    return random_.choice(ODD)


def mutated(random_: random.Random, content: bytes) -> bytes:
    """A few bytes changed, cut, repeated, inserted or swapped."""
    data = bytearray(content)
    for _ in range(random_.choice([1, 1, 2, 8])):
        at = random_.randrange(len(data) + 1)
        size = random_.choice([1, 1, 4, 64, len(data) // 3 + 1])
        match random_.randrange(6):
            case 0:
                data[at : at + 1] = bytes([random_.randrange(256)])
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size]
            case 3:
                data[at:at] = random_.randbytes(min(size, 64))
            case 4:
                data[at : at + size] = b"\0" * min(size, 64)
            case 5:
                data = data[:at]
    return bytes(data)


def changed(random_: random.Random, content: bytes) -> bytes:
    """JSON with one value removed or replaced by another kind of value."""
    about = json.loads(content)
    *before, last = random_.choice([*_places(about)])
    inside = about
    for key in before:
        inside = inside[key]
    if random_.random() < 0.4:
        del inside[last]
    else:
        inside[last] = random_.choice([None, [], {}, 0, -1, "", 3.5, True, "x", [None], {"type": "x"}, 2**70])
    return json.dumps(about).encode()


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of a nested structure are, but only the first of a long list or vocabulary."""
    if path:
        yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in [*inside][:8]:
        yield from _places(one, (*path, key))
