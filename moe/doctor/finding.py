"""What one check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`state`: ok; note, a run works but could be better; fail, a run will not work. `fix` says what to do."""

    name: str
    state: State
    found: str
    fix: str = ""
