"""Hugging Face's model families that the one backbone computes: for each a mapping of config keys and tensor names."""

from __future__ import annotations

from moe.config import ModelConfig, RouterConfig
from moe.errors import UserError
from moe.interop.families.base import Family
from moe.interop.families.llama import LLAMA
from moe.interop.families.mistral import MISTRAL
from moe.interop.families.mixtral import MIXTRAL
from moe.interop.families.olmoe import OLMOE
from moe.interop.families.qwen3 import QWEN3, QWEN3_MOE
from moe.interop.hub_config import HubConfig
from moe.untrusted import shown

# An export takes the first that can say what the model is.
FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (MISTRAL, LLAMA, MIXTRAL, OLMOE, QWEN3_MOE, QWEN3)
}


def family_of(config: HubConfig) -> Family:
    """Raises UserError naming the architecture where it is none of these."""
    model_type = config.take("model_type", None, lambda value: isinstance(value, str), "the name of a family")
    names = config.take(
        "architectures", None, lambda v: v is None or (isinstance(v, list) and len(v) == 1), "a list of one name"
    )
    known = ", ".join(f"{one.architecture} ({one.model_type})" for one in FAMILIES.values())
    family = FAMILIES.get(model_type)
    if family is None or (names is not None and names != [family.architecture]):
        stated = f"architectures={shown(names)}, model_type={shown(model_type)}"
        raise UserError(f"{config.path}: {stated} is another architecture: it must be one of {known}")
    return family


def family_for(model: ModelConfig, router: RouterConfig, step: int, wanted: str | None) -> tuple[Family, dict]:
    """(the family that can say what this model is, its config.json); `wanted` names one, else the first that can.

    Raises UserError with the keys that each lacks.
    """
    if wanted is not None and wanted not in FAMILIES:
        raise UserError(f"family={wanted} must be one of {', '.join(FAMILIES)}")
    reasons = []
    for name, family in FAMILIES.items():
        if wanted is None or name == wanted:
            try:
                return family, family.write(model, router, step)
            except UserError as error:
                reasons.append(f"{name} ({error})")
    raise UserError(f"this model can't be written as {'; '.join(reasons)}")
