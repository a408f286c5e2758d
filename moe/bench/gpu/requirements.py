"""What is required of an H200 in bfloat16, and whether a report's figures meet it. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe.bench.markdown import cell, table

MET, MISSED, UNMEASURED = "met", "missed", "not measured"


@dataclass(frozen=True, slots=True)
class Requirement:
    """The figure `key` of the stage `stage` must be at least `least` or at most `most`, one of which is None."""

    key: str
    stage: str
    name: str
    unit: str
    least: float | None = None
    most: float | None = None

    @property
    def target(self) -> str:
        return f"≤ {self.most:g} {self.unit}" if self.least is None else f"≥ {self.least:g} {self.unit}"

    def verdict(self, value: Any) -> str:
        """Of a number, of text in place of one that is not finite, or of None."""
        if value is None:
            return UNMEASURED
        if isinstance(value, str):
            return MISSED
        return (
            MET if (self.least is None or value >= self.least) and (self.most is None or value <= self.most) else MISSED
        )


REQUIREMENTS = (
    Requirement("speed", "layer", "Mixtral layer, forward and backward: of the measured product", "%", least=75),
    Requirement("kept", "layer", "what that layer keeps for its backward pass", "GiB", most=1.0),
    Requirement("mfu", "step", "step of 3.1 B parameters: MFU against the measured product", "%", least=50),
    Requirement("ratio", "peers", "tokens/s ÷ those of transformers' fastest", "×", least=1.5),
    Requirement("shallow", "memory", "Mixtral 8x7B, fewer layers: error of its planned memory", "%", most=10),
    Requirement("deep", "memory", "Mixtral 8x7B, more layers: error of its planned memory", "%", most=10),
)  # fmt: skip


def judged(stages: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each requirement: what a report's stages measured, and whether that meets it."""
    rows = []
    for each in REQUIREMENTS:
        found = stages.get(each.stage, {}).get("figures", {}).get(each.key, {"value": None, "beside": ""})
        rows.append(
            {
                "stage": each.stage,
                "required": each.name,
                "target": each.target,
                "measured": found["value"],
                "verdict": each.verdict(found["value"]),
                "beside": found["beside"],
            }
        )
    return rows


def verdicts(report: dict[str, Any]) -> list[str]:
    """The report's requirements as Markdown lines."""
    device = report["stages"].get("machine", {}).get("facts", {}).get("device", "an unknown device")
    rows = [
        [each["required"], each["target"], cell(each["measured"]), each["verdict"], each["beside"], each["stage"]]
        for each in report["requirements"]
    ]
    columns = ["required of an H200 in bfloat16", "target", f"measured on {device}", "verdict", "how", "stage"]
    return table(columns, rows)
