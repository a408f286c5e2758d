"""Prompts and answers out of packed rows: the last turn, whole answers, rows without prompts."""

from __future__ import annotations

import numpy as np
import torch

from moe.data.loader import Batch
from moe.train.answers import Question, questions

END = 9
SPECIAL = frozenset((END,))


def batch(*documents: tuple[list[int], list[bool]], size: int = 24) -> Batch:
    """One sequence of documents; each is its ids, and which of them are targets."""
    ids, labels, numbers = list[int](), list[int](), list[int]()
    for number, (tokens, targets) in enumerate(documents):
        ids += tokens
        labels += [token if target else -100 for token, target in zip(tokens[1:], targets[1:], strict=True)] + [-100]
        numbers += [number] * len(tokens)
    missing = size - len(ids)
    ids, labels, numbers = ids + [END] * missing, labels + [-100] * missing, numbers + [len(documents)] * missing
    rows = [torch.from_numpy(np.array([one], np.int64)) for one in (ids, labels, numbers)]
    return Batch(*rows, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


def test_the_last_turn_is_asked() -> None:
    one = ([1, 2, 3, 4, END], [False, False, False, True, True])
    two = ([1, 5, 6, END, 7, 8, END], [False, False, True, True, False, True, True])
    assert list(questions(batch(one, two), SPECIAL)) == [
        Question([1, 2, 3], [4, END]),
        Question([1, 5, 6, END, 7], [8, END]),
    ]


def test_rows_that_are_left_out() -> None:
    text = ([1, 2, 3, END], [False, True, True, True])  # no prompt but the beginning
    silent = ([1, 2, END], [False] * 3)
    assert list(questions(batch(text, silent), SPECIAL)) == []
    cut = ([1, 2, 3, 4], [False, False, True, True])
    assert list(questions(batch(cut, size=4), SPECIAL)) == []  # the sequence ends before the answer does
    assert list(questions(batch(cut, size=5), SPECIAL)) == [Question([1, 2], [3, 4])]  # a template without an end
