"""`moe validate`: the rows of a fine-tuning run, checked before it, and what is written about them."""

from __future__ import annotations

from dataclasses import dataclass

from moe.config.plan import PlanConfig
from moe.config.rules import filled, not_negative, require


@dataclass(kw_only=True, slots=True)
class ValidateConfig(PlanConfig):
    """Every key of `moe plan`, whose hardware the estimates are for.

    `fixed` is a new JSONL file for the rows that aren't bad; `page` an HTML page about the rows. `samples` rows are
    shown token by token; of the bad rows the terminal shows `problems`, the page all.
    """

    fixed: str | None = None
    page: str | None = None
    samples: int = 3
    problems: int = 50

    def __post_init__(self) -> None:
        PlanConfig.__post_init__(self)  # slots=True creates a new class, in which a bare super() fails
        filled("", self, "fixed", "page")
        not_negative("", self, "samples", "problems")
        require(
            self.data.has_records,
            "data.records=documents is text for pre-training, moe validate reads rows to fine-tune on: add data=sft",
        )
        for key, name, suffix in (("fixed", self.fixed, ".jsonl"), ("page", self.page, ".html")):
            require(name is None or name.endswith(suffix), f"{key}={name} must end with {suffix}: that is what it is")
