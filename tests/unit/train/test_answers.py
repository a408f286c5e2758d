"""Prompts and answers out of packed rows: the last turn, whole answers, rows without prompts; batches of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moe.config.compose import load_config
from moe.data.loader import Batch
from moe.distributed.mesh import Mesh
from moe.model.transformer import Transformer
from moe.train import answers
from moe.train.answers import Answers, Question, questions
from tests.e2e.conftest import SMALL
from tests.unit.interop.made import small_tokenizer

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


def test_a_documents_first_token_alone_at_a_sequences_end() -> None:
    begun = ([1], [True])
    whole = batch(([1, 2, 3, END], [True] * 4), begun, size=5)
    whole.labels_BS[0, -1] = 2  # the token that the next sequence begins with
    assert list(questions(whole, SPECIAL)) == []


def test_a_long_prompt_cuts_no_other_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, generator = (5, 9, 60, 7, 12), np.random.default_rng(0)
    prompts = [generator.integers(3, 500, size).tolist() for size in lengths]
    rows = [batch(([*one, 4], [False] * len(one) + [True]), size=64) for one in prompts]
    monkeypatch.setattr(answers, "held_out_batches", lambda *_, **__: rows)
    tokenizer = small_tokenizer()
    corpus: Any = SimpleNamespace(held_out=[SimpleNamespace(packed_length=64)], tokenizer=tokenizer)
    mesh = Mesh(0, 1, 0, 1, 1, torch.device("cpu"))

    def answered(size: int) -> list[str]:
        words = ["model.max_position_embeddings=64", f"train.micro_batch_size={size}", "train.answer_tokens=20"]
        words += ["train.answer_metrics=[exact_match]", "train.global_batch_size=60", "data.loss_on=completion"]
        config = load_config([*SMALL, "data=sft", "data.path=rows.jsonl", *words])
        model = Transformer(config.model, config.router, config.experts)
        model.init_weights(0)
        asked = Answers(config, corpus, mesh)
        return [row["answer"] for row in asked(model, lambda _: None)[1]]

    together = answered(5)
    assert together == answered(1)
    assert len(together) == len(lengths)
