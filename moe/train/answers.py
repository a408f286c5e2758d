"""Answers to held-out rows while training: greedy, from the prompt part of each row, beside the text expected.

A row's prompt is everything before its last run of targets, and that run is the answer: in a conversation the last
turn. The rows asked are those of the first held-out sequences; every rank knows all of them. The ranks that share
experts answer the same batches, with equally many passes; other groups of ranks answer other batches. Batches are
formed before they are divided, so that the number of ranks changes no answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe.config import Config, LossOn
from moe.config.generate import Sampling
from moe.config.rules import require
from moe.data.corpus import Corpus
from moe.data.loader import Batch, held_out_batches
from moe.data.packing import NO_TARGET
from moe.data.tokenizer_base import Tokenizer
from moe.distributed.mesh import Mesh
from moe.inference.decoding import IncrementalDecoder
from moe.inference.generate import NotFiniteError, stream
from moe.model.transformer import Transformer
from moe.train.answer_metrics import METRICS

SHOWN = 8  # rows that the report shows


@dataclass(frozen=True, slots=True)
class Question:
    """A row: the tokens of its prompt, and those of its answer, including the token that ends the answer."""

    prompt: list[int]
    answer: list[int]


def questions(batch: Batch, special: frozenset[int]) -> Iterator[Question]:
    """The rows of a batch that have a prompt and a whole answer (one that a special token ends, or that isn't cut by
    the end of its sequence), in order."""
    for ids_S, labels_S, documents_S in zip(
        batch.input_ids_BS.numpy(), batch.labels_BS.numpy(), batch.document_ids_BS.numpy(), strict=True
    ):
        for document in np.unique(documents_S):
            (places,) = np.nonzero(documents_S == document)
            start, stop = int(places[0]), int(places[-1]) + 1
            (targets,) = np.nonzero(labels_S[start:stop] != NO_TARGET)  # each is followed by a token to learn
            if not len(targets):
                continue
            last = int(targets[-1])
            breaks = np.nonzero(np.diff(targets) > 1)[0]
            first = int(targets[breaks[-1] + 1]) if len(breaks) else int(targets[0])
            ids = ids_S[start:stop].tolist()
            found = Question(ids[: first + 1], ids[first + 1 : last + 2])
            whole = bool(found.answer) and (found.answer[-1] in special or stop < len(ids_S))
            if len(found.prompt) > 1 and whole:
                yield found


class Answers:
    """Asks the same rows at every evaluation."""

    def __init__(self, config: Config, corpus: Corpus, mesh: Mesh) -> None:
        """Raises UserError where the data has no prompts, or the model can't generate."""
        train = config.train
        names = f"train.answer_metrics=[{','.join(metric.name for metric in train.answer_metrics)}]"
        require(
            any(stream.packed_length is not None for stream in corpus.held_out)
            and config.data.loss_on is not LossOn.everything,
            f"{names} needs rows with prompts (data=sft) and data.loss_on=completion or last_turn",
        )
        self._metrics, self._tokens, self._batch_size = (
            train.answer_metrics,
            train.answer_tokens,
            train.micro_batch_size,
        )
        self._tokenizer, self._mesh = corpus.tokenizer, mesh
        special = frozenset(corpus.tokenizer.special_tokens().values()) | {corpus.tokenizer.eos_id}
        self._rows: list[Question] = []
        for batch in held_out_batches(
            corpus,
            sequence_length=train.sequence_length,
            micro_batch_size=1,
            max_sequences=train.eval_sequences,
        ):
            self._rows += questions(batch, special)
            if len(self._rows) >= train.answer_rows:
                break
        self._rows = self._rows[: train.answer_rows]
        require(bool(self._rows), f"{names}: no held-out row has a prompt and a whole answer: hold out more rows")
        self._ends = frozenset(row.answer[-1] for row in self._rows) & special
        self._expected = [_text(self._tokenizer, row.prompt, row.answer, special) for row in self._rows]

    @classmethod
    def of(cls, config: Config, corpus: Corpus, mesh: Mesh) -> Answers | None:
        """None without `train.answer_metrics`. A collective. Raises as the constructor does."""
        return mesh.agree(lambda: cls(config, corpus, mesh), "data") if config.train.answer_metrics else None

    def describe(self) -> str:
        """One line: how many rows are asked, and how many of their answers can't be written."""
        cut = sum(len(row.answer) > self._tokens for row in self._rows)
        line = f"evaluations answer {len(self._rows)} held-out rows in at most {self._tokens} tokens each"
        return line + (f"; {cut} expected answers are longer: raise train.answer_tokens" if cut else "")

    def __call__(
        self, model: Transformer, begins: Callable[[str], None]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """({metric: mean over the rows; NaN where logits were not finite}, the first rows with their answers). A
        collective. `begins` is called with the name of each batch before it is computed."""
        size = self._batch_size
        batches = [range(len(self._rows))[start : start + size] for start in range(0, len(self._rows), size)]
        together = self._mesh.expert_parallel_size  # ranks that answer the same batches
        groups, own = self._mesh.world_size // together, self._mesh.rank // together
        found: dict[int, str | None] = {}
        for number in range(own, len(batches), groups):
            begins(f"answers, batch {number + 1} of {len(batches)}")
            found |= zip(batches[number], self._answer(model, batches[number], together > 1), strict=True)
        by_place = {place: text for answers in self._mesh.gather(found) for place, text in answers.items()}
        answers = [by_place[place] for place in range(len(self._rows))]
        scores = {
            metric.name: math.nan
            if None in answers
            else sum(METRICS[metric](answer or "", text) for answer, text in zip(answers, self._expected, strict=True))
            / len(answers)
            for metric in self._metrics
        }
        shown = [
            {"prompt": self._tokenizer.decode(row.prompt), "expected": expected, "answer": answer or ""}
            for row, expected, answer in zip(self._rows[:SHOWN], self._expected, answers, strict=False)
        ]
        return scores, shown

    def _answer(self, model: Transformer, places: range, all_steps: bool) -> list[str | None]:
        """None for every row of a batch whose logits are not finite."""
        prompts = [self._rows[place].prompt for place in places]
        room = model.config.max_position_embeddings - max(map(len, prompts))
        if room < self._tokens and len({*map(len, prompts)}) > 1:  # so that a long prompt cuts no shorter one's answer
            half = len(places) // 2
            return [text for part in (places[:half], places[half:]) for text in self._answer(model, part, all_steps)]
        settings = Sampling(max_new_tokens=min(self._tokens, room), temperature=0.0)
        try:
            texts = [""] * len(prompts)
            for piece in stream(model, self._tokenizer, prompts, settings, ends=self._ends, all_steps=all_steps):
                texts[piece.prompt] += piece.text
        except NotFiniteError:  # the guard decides whether training can go on
            return [None] * len(places)
        return [text.strip() for text in texts]


def _text(tokenizer: Tokenizer, prompt: list[int], answer: list[int], special: frozenset[int]) -> str:
    """The answer's text behind its prompt, without the special token that ends it."""
    decoder = IncrementalDecoder(tokenizer, prompt)
    ids = answer[:-1] if answer[-1] in special else answer
    return ("".join(map(decoder.add, ids)) + decoder.end()).strip()
