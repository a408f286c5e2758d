"""Search spaces in Hydra's language, and what is refused."""

from __future__ import annotations

import pytest

from moe.config.space import flat_space, read_space


def test_each_form_is_read() -> None:
    log, whole, some, listed = read_space(
        {
            "router.aux_loss_coef": "tag(log, interval(1e-4, 1e-1))",
            "router": {"top_k": "int(interval(1, 4))", "jitter_noise": "range(0, 0.3, 0.1)"},
            "optim.betas": "[0.9,0.95],[0.9,0.99]",
        }
    )
    assert (log.key, log.low, log.high, log.log) == ("router.aux_loss_coef", 1e-4, 1e-1, True)
    assert (whole.key, whole.low, whole.high, whole.whole) == ("router.top_k", 1, 4, True)
    assert whole.finite() == (1, 2, 3, 4)
    assert some.finite() == pytest.approx((0, 0.1, 0.2))
    assert log.override(0.0012345678901234567) == "router.aux_loss_coef=0.0012345678901234567"
    assert listed.override(listed.values[1]) == "optim.betas=[0.9,0.99]"


def test_a_command_lines_nested_key_replaces_the_presets() -> None:
    assert flat_space({"router.top_k": "1,2", "router": {"top_k": "3,4"}}) == {"router.top_k": "3,4"}


def test_null_and_texts_are_values() -> None:
    (one,) = read_space({"router.capacity_factor": "null,1.25"})
    assert [one.override(value) for value in one.values] == [
        "router.capacity_factor=null",
        "router.capacity_factor=1.25",
    ]
    (group,) = read_space({"router": "glob(top*)"})
    assert group.values == ("topk",)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("interval(1,0)", "interval(1, 0): the first number must be < the second"),
        ("tag(log, interval(0, 1))", "a log interval must begin above 0, not at 0"),
        ("choice()", "empty choice is not legal"),
        ("0.1", "is one value: a space needs choice(…), range(…) or interval(…)"),
        ("tag(fast, choice(1, 2))", "the only tag is log"),
        ("tag(log, choice(1, 2))", "tag(log, …) needs interval(…)"),
        ("choice(1, 1)", "must have each value once"),
        ("shuffle(1, 2)", "the sampler decides the order"),
        ("glob(*)", "glob(…) is for a group"),
        ("choice(1", "not in Hydra's override language"),
        ([1, 2], "must be in Hydra's override language, as in choice("),
    ],
)
def test_what_is_no_space_is_refused_with_its_key(expression: object, said: str) -> None:
    with pytest.raises(ValueError, match=r"^(sweep\.space\.)?optim\.lr=") as refused:
        read_space({"optim.lr": expression})
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
