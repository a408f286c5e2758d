"""Lists the packages that a GPU machine lacks, in the versions installed here: `python -m moe.bench.gpu.wheels 3.12`.

These are the requirements of `moe`, without those that the report doesn't use, and in turn their requirements.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys

from packaging.requirements import Requirement

# Installed on any machine for PyTorch and transformers, with their own requirements.
THERE = {
    "torch", "triton", "transformers", "numpy", "packaging", "pyyaml", "regex", "safetensors", "setuptools",
    "tokenizers", "tqdm",
}  # fmt: skip
UNUSED = {"datasets", "wandb", "mistral-common"}  # the report has local text, tracking=none and its own tokenizer
TOOLS = ["pytest", "pytest-timeout"]  # for the stage that runs tests
PROJECT = "moe-train"


def lacking(python_version: str) -> list[str]:
    """`name==version` of each distribution, sorted. Raises importlib.metadata.PackageNotFoundError for one that
    isn't installed here."""
    environment = {"python_version": python_version, "python_full_version": f"{python_version}.0", "extra": ""}
    environment |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    waiting, found = [PROJECT, *TOOLS], dict[str, str]()
    while waiting:
        name = waiting.pop()
        distribution = importlib.metadata.distribution(name)
        found[name] = distribution.version
        for text in distribution.requires or []:
            requirement = Requirement(text)
            needed = _canonical(requirement.name)
            applies = requirement.marker is None or requirement.marker.evaluate(environment)
            if applies and needed not in THERE | UNUSED | found.keys():
                waiting.append(needed)
    del found[PROJECT]
    return sorted(f"{name}=={version}" for name, version in found.items())


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m moe.bench.gpu.wheels PYTHON_VERSION")
    print("\n".join(lacking(sys.argv[1])))
