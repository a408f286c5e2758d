"""Our model as the harness sees it: an `LM` whose requests are texts.

Every text begins with the beginning of a document, as in training. In a rolling log-likelihood that token is given,
not predicted. Of a conversation the harness passes on the text that the chat template made; its tokens are those of
training, in which only the template makes special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows
from tqdm import tqdm

from moe.config import EvaluateConfig, TemplateName
from moe.config.generate import Sampling
from moe.config.rules import require
from moe.data.chat_template import ChatTemplate, Segment, open_template
from moe.data.record_encoding import encode_segments
from moe.data.tokenizer_base import Tokenizer
from moe.distributed.mesh import Mesh
from moe.errors import UserError
from moe.evaluate.scorer import Scored, Scorer, divided
from moe.inference.generate import stream
from moe.model.transformer import Transformer

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


class HarnessModel(TemplateLM):
    """The harness runs on every rank, with all requests; the ranks divide the batches (`moe.evaluate.scorer`).

    `answering`: requests are being answered, so that an exception is ours.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, mesh: Mesh, config: EvaluateConfig) -> None:
        """Raises UserError where there is no chat template to apply."""
        super().__init__()
        self._model, self._tokenizer, self._mesh, self._config = model, tokenizer, mesh, config
        self.max_length = model.config.max_position_embeddings
        self.answering = False
        form = _template(tokenizer) if config.apply_chat_template else (None, "", frozenset())
        self._template, self._lead, self._ends = form
        self._rendered: dict[str, list[Segment]] = {}  # by the text that the harness has of them

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids = self._tokenizer.encode(string)
        return ids if add_special_tokens is False else [self._tokenizer.bos_id, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Raises UserError for an empty continuation, or one that is longer than the model's positions."""
        for request in requests:
            require(bool(_arguments(request)[1]), f"{_place(request)}: what is to be scored is empty: correct the task")
        with self._answering():
            return super().loglikelihood(requests, disable_tqdm=True)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        segments = self._rendered.get(context)
        if segments is None:
            return super()._encode_pair(context, continuation)
        # As of any text, spaces at the end of the context are scored with the continuation.
        spaces = ""
        if segments[-1].token is None:
            kept = segments[-1].text.rstrip()
            spaces = segments[-1].text[len(kept) :]
            segments = [*segments[:-1], Segment(kept)] if kept else segments[:-1]
        [(ids_T, turns_T)] = encode_segments([[*segments, Segment(spaces + continuation, None, 0)]], self._tokenizer)
        given = int((turns_T < 0).sum())
        return ids_T[:given].tolist(), ids_T[given:].tolist()

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for (_, text), _, continuation in requests:
            require(
                0 < len(continuation) <= self.max_length,
                f"{text[:60]!r}: {len(continuation)} tokens are to be scored, and they must be 1 to "
                f"model.max_position_embeddings={self.max_length}",
            )
        sequences = [Scored(context + continuation, len(continuation)) for _, context, continuation in requests]
        return self._score(sequences)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text. A longer text than the model's positions is cut into windows; each
        token is predicted once, with as much before it as fits."""
        with self._answering():
            return self._rolling(requests)

    def _rolling(self, requests: list[Instance]) -> list[float]:
        sequences, owners = list[Scored](), list[int]()
        for owner, request in enumerate(requests):
            ids = self._tokenizer.encode(_arguments(request)[0])
            for given, predicted in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                sequences.append(Scored([*given, predicted[-1]], len(predicted)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._score(sequences), strict=True):
            totals[owner] += nats
        return totals

    def _score(self, sequences: list[Scored]) -> list[tuple[float, bool]]:
        with self._bar(len(sequences), "log-likelihoods") as bar:
            scorer = Scorer(self._model, self._mesh, self._config.batch_size, _updates(bar))
            return scorer.score(sequences)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Raises UserError for a sampling option that there isn't here, and where no position is left for a prompt."""
        with self._answering():
            return self._generate(requests)

    def _generate(self, requests: list[Instance]) -> list[str]:
        prompts = [self._prompt_ids(_arguments(request)[0]) for request in requests]
        groups: dict[str, list[int]] = {}  # by how they are generated
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(_arguments(request)[1], sort_keys=True, default=str), []).append(place)
        texts = [""] * len(requests)
        with self._bar(len(requests), "generated texts") as bar:
            for places in groups.values():
                settings, until = self._settings(requests[places[0]])
                room = self.max_length - settings.max_new_tokens
                size = self._config.batch_size
                places.sort(key=lambda place: (-len(prompts[place]), prompts[place]))
                batches = [places[start : start + size] for start in range(0, len(places), size)]
                given = [[prompts[place][-room:] for place in batch] for batch in batches]
                numbered = [*enumerate(given)]

                def answer(one: tuple[int, list[list[int]]], s: Sampling = settings, u: list[str] = until) -> list[str]:
                    found = self._generated(one[1], replace(s, seed=one[0]), u)
                    _updates(bar)(len(found))
                    return found

                for batch, found in zip(batches, divided(self._mesh, numbered, answer), strict=True):
                    for place, text in zip(batch, found, strict=True):
                        texts[place] = text
        return texts

    def _prompt_ids(self, text: str) -> list[int]:
        segments = self._rendered.get(text)
        if segments is None:
            return self.tok_encode(text)
        [(ids_T, _)] = encode_segments([segments], self._tokenizer)
        return ids_T.tolist()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation's text up to the answer; or through the last message, which begins it. Raises DataError
        where the template refuses it."""
        assert self._template is not None
        messages: list[Any] = [{"role": one["role"], "content": one["content"]} for one in chat_history]
        asked = messages if add_generation_prompt else messages[:-1]
        segments = [replace(one, turn=-1) for one in self._template.prompt(asked, "a task's conversation")]
        if not add_generation_prompt:
            segments.append(Segment(self._lead + messages[-1]["content"]))
        text = "".join(one.text for one in segments)
        self._rendered[text] = segments
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._template.source if self._template is not None else ""

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    @contextmanager
    def _answering(self) -> Iterator[None]:
        self.answering = True
        yield
        self.answering = False

    def _settings(self, request: Instance) -> tuple[Sampling, list[str]]:
        """How a request's text is generated, and the texts that end it."""
        try:
            stated: dict[str, Any] = dict(normalize_gen_kwargs(_arguments(request)[1], self._config.max_gen_toks))
            until = [text for text in stated.pop("until") if text]
            most = stated.pop("max_gen_toks")
            sampled = stated.get("do_sample")
            temperature = float(stated.get("temperature", 0.0)) if sampled else 0.0
            used = SAMPLING[2:] if sampled else ("repetition_penalty",)
            options = {name: stated[name] for name in used if stated.get(name)}
            unknown = sorted(stated.keys() - set(SAMPLING))
            require(not unknown, f"{', '.join(unknown)}: not an option here; {', '.join(SAMPLING)} are")
            require(
                0 < most < self.max_length,
                f"max_gen_toks={most} must be less than model.max_position_embeddings={self.max_length}, which prompt "
                "and text share: state another in the task, or max_gen_toks=… where it states none",
            )
            return Sampling(max_new_tokens=most, temperature=temperature, **options), until
        except (UserError, TypeError, ValueError) as error:
            raise UserError(f"{_place(request)}: generation_kwargs: {error}") from error

    def _generated(self, prompts: list[list[int]], settings: Sampling, until: list[str]) -> list[str]:
        texts, going = [""] * len(prompts), set(range(len(prompts)))
        found = stream(self._model, self._tokenizer, prompts, settings, ends=self._ends, joined=False)
        with closing(found) as pieces:
            for piece in pieces:
                texts[piece.prompt] += piece.text
                if piece.done or any(end in texts[piece.prompt] for end in until):
                    going.discard(piece.prompt)
                if not going:
                    break
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _bar(self, total: int, what: str) -> Any:
        return tqdm(total=total, desc=what, disable=None if self._mesh.is_main else True)


def _template(tokenizer: Tokenizer) -> tuple[ChatTemplate, str, frozenset[int]]:
    """The tokenizer's template, what it has between a prompt and an answer, and the token behind an answer, if it isn't
    the end of the sequence."""
    require(
        tokenizer.chat_template is not None,
        "apply_chat_template=true: the checkpoint's tokenizer has no chat template, so it was not trained on "
        "conversations: leave it out",
    )
    template = open_template(TemplateName.tokenizer, tokenizer)
    lead, end = template.answer_form()
    return template, lead, frozenset() if end is None else frozenset((end,))


def _updates(bar: Any) -> Callable[[int], None]:
    return lambda count: bar.update(count) and None


def _arguments(request: Instance) -> tuple[Any, ...]:
    return request.args


def _place(request: Instance) -> str:
    return f"task {request.task_name}, document {request.doc_id}"
