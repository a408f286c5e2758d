"""The experts' colours; here and not in page.css because a test measures them.

Eight fills for light and eight for dark mode; an expert has the same hue in both. They were found by search: with
normal vision, protanopia, deuteranopia and tritanopia (Machado et al. 2009) every pair can be told apart, and the
page's text is readable on each.
"""

from __future__ import annotations

EXPERT_FILLS_LIGHT = ("#4ea4ca", "#fba962", "#54d8b1", "#d87495", "#bcb3fa", "#ab9925", "#b7f0fb", "#eaec82")
EXPERT_FILLS_DARK = ("#065591", "#5c2604", "#01423b", "#84266c", "#460587", "#5c5139", "#3b7475", "#5c7312")
INK_LIGHT = "#1a1f2b"
INK_DARK = "#eef0f5"
UNDERLINES = ("none", "solid", "dotted", "double")  # tell expert 0 from 8, 16 and 24


def expert_class(expert: int) -> str:
    """CSS classes of an expert: its fill, and its underline, which tells experts with the same fill apart."""
    fills, lines = len(EXPERT_FILLS_LIGHT), len(UNDERLINES)
    return f"c{expert % fills} u{expert // fills % lines}"


def css() -> str:
    """CSS for the classes that `expert_class` returns."""
    pairs = zip(EXPERT_FILLS_LIGHT, EXPERT_FILLS_DARK, strict=True)
    variables = [f"--ink:light-dark({INK_LIGHT},{INK_DARK})"]
    fills = [
        f".c{index}{{background:light-dark({light},{dark});color:var(--ink)}}"
        for index, (light, dark) in enumerate(pairs)
    ]
    lines = [f".u{index}{{text-decoration:underline {style} 1.5px}}" for index, style in enumerate(UNDERLINES) if index]
    return f":root{{{';'.join(variables)}}}\n" + "\n".join(fills + lines)
