"""Expert choice: by hand, its rows' order, and the two ways in which a sequence can be read."""

from __future__ import annotations

import math

import pytest
import torch

from moe.config import ExpertChoiceRouterConfig
from moe.sparse.routers import expert_choice
from tests.unit.sparse.routers.helpers import checked_gradients, made, rows_of, with_logits


def config(experts: int = 4, factor: float = 2.0, **options: float) -> ExpertChoiceRouterConfig:
    return ExpertChoiceRouterConfig(num_experts=experts, capacity_factor=factor, **options)


def test_each_expert_takes_its_best_tokens_by_hand() -> None:
    """Two experts take ceil(3 · 1 / 2) = 2 of three tokens each; expert 1 takes what expert 0 likes least."""
    router = with_logits(config(2, 1.0))
    first = [0.9, 0.2, 0.6]
    routed = router(torch.tensor([[[math.log(p), math.log(1 - p)] for p in first]]))
    assert rows_of(routed) == [(0, 0), (1, 1), (2, 0), (2, 1)]
    assert routed.choices.weights_N.tolist() == pytest.approx([0.9, 0.8, 0.6, 0.4])
    assert routed.counts_E.tolist() == [2, 2]
    assert routed.choices.per_token is None
    assert routed.dropped.item() == 0
    assert routed.diagnostics["unserved_fraction"].item() == 0


def test_of_equal_scores_the_earliest_are_taken_and_the_others_go_unserved() -> None:
    router = with_logits(config(4, 2.0))
    routed = router(torch.zeros(2, 6, 4))  # ceil(6 · 2 / 4) = 3
    tokens = [token for token in (0, 1, 2, 6, 7, 8) for _ in range(4)]
    assert rows_of(routed) == [(token, expert % 4) for expert, token in enumerate(tokens)]
    assert routed.diagnostics["unserved_fraction"].item() == 0.5


def test_rows_are_in_token_order_a_tokens_most_probable_expert_first() -> None:
    routed = made(config(5, 3.0))(torch.randn(3, 11, 16))
    rows = rows_of(routed)
    weights = routed.choices.weights_N.tolist()
    expected = sorted(rows, key=lambda row: (row[0], -routed.probs_TE[row].item()))
    assert rows == expected
    assert weights == [routed.probs_TE[row].item() for row in rows]
    assert len({token for token, _ in rows}) < 33 or len(rows) > 33, "some tokens have several, some no expert"


def test_a_sequence_is_read_alone() -> None:
    router, x_BSH = made(config(4, 1.5)), torch.randn(3, 9, 16)
    apart = [
        (9 * number + token, expert) for number in range(3) for token, expert in rows_of(router(x_BSH[number, None]))
    ]
    assert rows_of(router(x_BSH)) == apart


def _by_prefixes(router: expert_choice.ExpertChoiceRouter, x_BSH: torch.Tensor) -> list[tuple[int, int]]:
    """Every prefix routed as a sequence of its own, of which the last token's experts count."""
    router.reads_prefix = False
    rows = []
    for sequence in range(x_BSH.shape[0]):
        for end in range(1, x_BSH.shape[1] + 1):
            routed = router(x_BSH[sequence : sequence + 1, :end])
            place = sequence * x_BSH.shape[1] + end - 1
            rows += [(place, expert) for token, expert in rows_of(routed) if token == end - 1]
    router.reads_prefix = True
    return rows


@pytest.mark.parametrize("compared", [1 << 24, 1, 400])
@pytest.mark.parametrize("ties", [False, True])
def test_reading_prefixes_equals_routing_every_prefix(
    compared: int, ties: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_choice, "COMPARED", compared)
    router = made(config(4, 1.5)).eval()
    assert isinstance(router, expert_choice.ExpertChoiceRouter)
    x_BSH = torch.randn(2, 13, 16)
    if ties:
        x_BSH[:, 1::2] = x_BSH[:, :1]
    expected = _by_prefixes(router, x_BSH)
    assert rows_of(router(x_BSH)) == expected


def test_prefix_reading_is_causal_and_sequence_reading_is_not() -> None:
    router, x_BSH = made(config(4, 1.0)).eval(), torch.randn(1, 24, 16)
    changed = x_BSH.clone()
    changed[:, 12:] = 5 * torch.randn(1, 12, 16)

    def before() -> list[list[tuple[int, int]]]:
        return [[row for row in rows_of(router(x)) if row[0] < 12] for x in (x_BSH, changed)]

    whole, of_changed = before()
    assert whole != of_changed
    router.reads_prefix = True
    whole, of_changed = before()
    assert whole == of_changed


def test_training_never_reads_prefixes() -> None:
    router, x_BSH = made(config()), torch.randn(1, 24, 16)
    rows = rows_of(router(x_BSH))
    router.reads_prefix = True
    assert rows_of(router(x_BSH)) == rows
    assert rows_of(router.eval()(x_BSH)) != rows


def test_an_empty_batch_has_no_rows() -> None:
    router = made(config())
    assert rows_of(router(torch.zeros(0, 4, 16))) == []
    router.eval().reads_prefix = True
    assert rows_of(router(torch.zeros(0, 4, 16))) == []


def test_gradients_equal_finite_differences() -> None:
    router = made(config(4, 1.5, z_loss_coef=0.1), 5)
    checked_gradients(router, torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2)))
