"""A standalone SVG with text that is escaped and wrapped: for a Markdown page, where it is an image of its own.

It has a white background, since a page in a dark theme doesn't restyle images. Lengths are in pixels.
"""

from __future__ import annotations

import unicodedata
from html import escape

from moe.report.palette import INK_LIGHT

WIDTH = 840  # about the width of a page on GitHub, so that text keeps its size
FONT = 14
LINE = 18  # from one line of text to the next
MUTED, HAIR = "#566072", "#e4e7ec"  # --muted and --hair of page.css, in light mode
LINES = ("#2563c9", "#c2570c", "#0d7d63", "#97418c", "#7a6a00", "#5b6472")  # its --l0 to --l5
WIDE, NARROW = "ABCDEFGHKMNOPQRSTUVWXYZmw%@=+<>~÷×–—…", " fijlrt.,:;'|!()[]-"


def width(text: str) -> float:
    """At most this wide in the usual sans-serif fonts."""
    return FONT * sum(map(_share, text))


def _share(character: str) -> float:
    if unicodedata.east_asian_width(character) in "WF":
        return 1.1
    if character in NARROW:
        return 0.42
    return 0.88 if character in WIDE or ord(character) > 0xFF else 0.64


def wrapped(text: str, room: float) -> list[str]:
    """Lines that are at most `room` wide, broken between words, and within a word that is wider alone."""
    lines: list[str] = []
    line = ""
    for word in printable(text).split():
        joined = f"{line} {word}" if line else word
        if width(joined) <= room:
            line = joined
            continue
        if line:
            lines.append(line)
        line = ""
        for character in word:
            if line and width(line + character) > room:
                lines.append(line)
                line = ""
            line += character
    return [*lines, line] if line or not lines else lines


def printable(text: str) -> str:
    """With spaces in place of characters that XML or a line of Markdown can't have."""
    return "".join(one if one.isprintable() else " " for one in text)


class Drawing:
    """Collects elements; `document` is the file's text."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def text(self, x: float, y: float, text: str, fill: str = INK_LIGHT, style: str = "") -> None:
        """`y` is the middle of the line; `style` has classes: `bold`, `middle`, `end`."""
        classes = f' class="{style}"' if style else ""
        content = escape(printable(text), quote=False)
        self._parts.append(
            f'<text x="{_number(x)}" y="{_number(y + 0.35 * FONT)}" fill="{fill}"{classes}>{content}</text>'
        )

    def rectangle(self, x: float, y: float, wide: float, high: float, fill: str) -> None:
        place = f'x="{_number(x)}" y="{_number(y)}" width="{_number(wide)}" height="{_number(high)}"'
        self._parts.append(f'<rect {place} fill="{fill}"/>')

    def line(self, points: list[tuple[float, float]], stroke: str, wide: float = 1, dash: str = "") -> None:
        path = "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="{_number(wide)}"{dashes}/>')

    def dot(self, x: float, y: float, fill: str) -> None:
        self._parts.append(f'<circle cx="{_number(x)}" cy="{_number(y)}" r="3" fill="{fill}"/>')

    def document(self, high: float, title: str, description: str) -> str:
        """`title` and `description` are for readers who can't see it."""
        size = f'width="{WIDTH}" height="{_number(high)}" viewBox="0 0 {WIDTH} {_number(high)}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="title description">',
                f'<title id="title">{escape(printable(title), quote=False)}</title>',
                f'<desc id="description">{escape(printable(description), quote=False)}</desc>',
                "<style>text{font:"
                + f"{FONT}px"
                + " system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif;"
                "paint-order:stroke;stroke:#ffffff;stroke-width:3px;stroke-linejoin:round}"
                ".bold{font-weight:600}.middle{text-anchor:middle}.end{text-anchor:end}</style>",
                f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{_number(high - 1)}" rx="8" fill="#ffffff" '
                f'stroke="{HAIR}"/>',
                *self._parts,
                "</svg>\n",
            ]
        )


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
