"""Keys of several benchmarks; all other overrides are those of `moe train`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe.errors import UserError


@dataclass(kw_only=True, slots=True)
class Rounds:
    """`rounds` pairs of measurements of `steps` optimizer steps each."""

    rounds: int = 7
    steps: int = 3

    def __post_init__(self) -> None:
        for name in ("rounds", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be ≥ 1")


def split(overrides: list[str], default: Rounds | None = None) -> tuple[Rounds, list[str]]:
    """Splits `rounds=` and `steps=` from the other overrides. Raises UserError."""
    own: dict[str, int] = {}
    rest: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in Rounds.__slots__:
            rest.append(override)
            continue
        try:
            own[key] = int(value)
        except ValueError:
            raise UserError(f"{override} must be a whole number") from None
    return replace(default or Rounds(), **own), rest
