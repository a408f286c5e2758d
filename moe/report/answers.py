"""Answers to held-out rows, of the newest evaluation that asked for them (answers.json). All text is escaped."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

from moe.untrusted import Values, read_object

FIX = "remove it; the next evaluation of `moe train` writes it anew"
MOST_ROWS = 100
CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class AnsweredRows:
    """Each row is its prompt, the text expected, and the model's."""

    step: int
    rows: list[tuple[str, str, str]]


def read_answers(path: Path) -> AnsweredRows | None:
    """None if the run has written none. Raises UserError naming the file and the key."""
    if not path.exists():
        return None
    data = read_object(path, FIX)
    rows = data.take("rows", lambda value: isinstance(value, list) and len(value) <= MOST_ROWS, "a list of rows")
    taken = [Values.of(row, f"{path}: row {number}", FIX) for number, row in enumerate(rows)]
    texts = [(row.text("prompt"), row.text("expected"), row.text("answer")) for row in taken]
    return AnsweredRows(data.count("step"), texts)


def answers_table(answered: AnsweredRows) -> str:
    rows = "".join(
        f"<article><h3>{'as expected' if answer == expected else 'not as expected'}</h3>"
        f"<pre><b>{_short(prompt)}</b>\n{_short(answer)}</pre>"
        + (f"<pre>expected: {_short(expected)}</pre>" if answer != expected else "")
        + "</article>"
        for prompt, expected, answer in answered.rows
    )
    note = f"Held-out rows, greedy answers of the evaluation at step {answered.step:,}."
    return f'<p class="note">{note}</p><div class="samples">{rows}</div>'


def _short(text: str) -> str:
    return escape(text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}…")
