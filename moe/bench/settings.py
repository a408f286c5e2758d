"""Keys that the benchmarks share; every other word is one of `moe train`'s."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(kw_only=True, slots=True)
class Rounds:
    """`rounds` pairs of measurements of `steps` optimizer steps each."""

    rounds: int = 7
    steps: int = 3

    def __post_init__(self) -> None:
        for name in ("rounds", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be ≥ 1")


def split(words: list[str], default: Rounds | None = None) -> tuple[Rounds, list[str]]:
    """`rounds=` and `steps=`, and the words that are neither. Raises ValueError."""
    own: dict[str, int] = {}
    rest: list[str] = []
    for word in words:
        key, _, value = word.partition("=")
        if key not in Rounds.__slots__:
            rest.append(word)
            continue
        try:
            own[key] = int(value)
        except ValueError:
            raise ValueError(f"{word} must be a whole number") from None
    return replace(default or Rounds(), **own), rest
