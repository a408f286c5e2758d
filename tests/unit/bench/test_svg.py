"""Text of standalone SVGs: it is escaped, it fits and nothing of it is lost."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

import moe.report
from moe.bench.svg import FONT, HAIR, LINES, MUTED, WIDTH, Drawing, printable, width, wrapped


@pytest.mark.parametrize(
    "text",
    ["", "short", "two words and more of them, until a line ends", "x" * 300, "a " + "train.key=1," * 30, "損失 " * 40],
)
def test_lines_fit_and_lose_nothing(text: str) -> None:
    lines = wrapped(text, 200)
    assert lines
    assert all(width(line) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_a_room_narrower_than_a_character_ends() -> None:
    assert wrapped("abc", 1) == ["a", "b", "c"]


def test_text_is_escaped_and_has_no_control_characters() -> None:
    drawing = Drawing()
    drawing.text(10, 10, "<script>alert(1)</script> & \x00\x1b\ud800\n]]>")
    text = drawing.document(50, "</title><script>", "<b>&amp;")
    assert "<script" not in text
    root = ElementTree.fromstring(text)
    found = ["".join(one.itertext()) for one in root if one.tag.endswith(("text", "title", "desc"))]
    assert found == ["</title><script>", "<b>&amp;", "<script>alert(1)</script> &      ]]>".replace("      ", "     ")]
    text.encode()  # a lone surrogate can't be


def test_widths_are_not_less_than_those_of_a_wide_font() -> None:
    """DejaVu Sans, in units of 1/2048 of the font's size."""
    advances = {"a": 1255, "e": 1260, "i": 569, "m": 1995, "s": 1067, "t": 803, "W": 2025, "0": 1303, "=": 1716}
    for sample in ("peers, precision=bfloat16, 2 threads", "median time"):
        known = [one for one in sample if one in advances]
        assert sum(advances[one] for one in known) / 2048 * FONT <= width("".join(known))
    assert width("0" * 80) < WIDTH


def test_colours_are_the_pages() -> None:
    css = (Path(moe.report.__file__).parent / "page.css").read_text()
    light = dict(re.findall(r"--(\w+): light-dark\((#\w+),", css))
    assert (light["muted"], light["hair"]) == (MUTED, HAIR)
    assert tuple(light[f"l{index}"] for index in range(6)) == LINES


def test_printable_keeps_length() -> None:
    assert printable("a\nb\x00c") == "a b c"
