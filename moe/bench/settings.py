"""Keys of several benchmarks; all other overrides are those of `moe train`. And how rounds' ratios are stated."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe.errors import UserError

DISAGREE = 1.5  # largest ÷ smallest ratio of a run's rounds


@dataclass(kw_only=True, slots=True)
class Rounds:
    """`rounds` pairs of measurements of `steps` optimizer steps each."""

    rounds: int = 7
    steps: int = 3

    def __post_init__(self) -> None:
        for name in ("rounds", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be ≥ 1")


def split(
    overrides: list[str], default: Rounds | None = None, names: tuple[str, ...] = ("rounds", "steps")
) -> tuple[Rounds, list[str]]:
    """Splits `rounds=` and `steps=`, or those of them in `names`, from the other overrides. Raises UserError."""
    own: dict[str, int] = {}
    rest: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in names:
            rest.append(override)
            continue
        try:
            own[key] = int(value)
        except ValueError:
            raise UserError(f"{override} must be a whole number") from None
    return replace(default or Rounds(), **own), rest


def counted(number: int, noun: str) -> str:
    """`1 round`, `3 rounds`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def spread(ratios: list[float]) -> str:
    """`1.10 to 1.30`, with a warning where the rounds disagree; `1.10` of one round."""
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    warning = "; the rounds disagree: the machine is busy" if max(ratios) > DISAGREE * min(ratios) else ""
    return f"{min(ratios):.2f} to {max(ratios):.2f}{warning}"
