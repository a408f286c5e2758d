"""Completion, in a real bash: verbs, groups with presets, keys, and the values of choices."""

import subprocess
from functools import cache

import pytest

from moe.cli.completion import completion_script

script_of_all_verbs = cache(completion_script)  # the same for every line, and a second's work


def complete(line: str) -> list[str]:
    """What bash offers after `line`."""
    script = f"{script_of_all_verbs()}\nCOMP_LINE={line!r} COMP_POINT={len(line)}\ncompopt() {{ :; }}\n_moe\n"
    script += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("moe tr", ["train"]),
        ("moe train model=mixt", ["mixtral_8x22b", "mixtral_8x7b"]),
        ("moe train train.steps=5 router.top", ["router.top_k="]),
        ("moe train train.precision=", ["bfloat16", "float32"]),
        ("moe plan hardware=h", ["h100", "h200"]),
        ("moe generate max_new", ["max_new_tokens="]),
        ("moe cp model/s", ["model/small"]),
        ("moe ls tok", ["tokenizer"]),
        ("moe bench pe", ["peers"]),
        ("moe report run", []),
    ],
)
def test_what_is_offered(line: str, expected: list[str]) -> None:
    assert sorted(complete(line)) == expected


def test_all_verbs_are_offered_first() -> None:
    assert {"train", "plan", "prepare", "generate", "report", "bench", "ls", "cp", "completion"} <= set(
        complete("moe ")
    )
