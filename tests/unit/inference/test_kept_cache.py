"""A kept cache changes no logits and no answer, whatever the next text has in common with the last one."""

from __future__ import annotations

import random

import pytest
import torch

from moe.config import (
    ExpertsConfig,
    Initializer,
    ModelConfig,
    TemplateName,
    TokenizerConfig,
    TokenizerKind,
    TopKRouterConfig,
)
from moe.config.generate import Sampling
from moe.data.tokenizer import open_tokenizer
from moe.inference.chat import Asking, Conversation
from moe.inference.generate import stream
from moe.inference.kept_cache import KeptCache
from moe.model.transformer import Transformer


@pytest.fixture(scope="module")
def tokenizer():
    return open_tokenizer(TokenizerConfig(kind=TokenizerKind.mistral))


def build(tokenizer, window=None) -> Transformer:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        initializer=Initializer.normal, initializer_range=0.3, max_position_embeddings=256, sliding_window=window,
    )  # fmt: skip
    model = Transformer(config, TopKRouterConfig(), ExpertsConfig()).double()
    model.init_weights(0)
    return model.eval()


@torch.no_grad()
def feed(model, cache, ids) -> torch.Tensor:
    """The logits behind each of the tokens that the cache doesn't have."""
    new = torch.tensor([ids[cache.length :]])
    return model(new, document_ids_BS=torch.ones_like(new), cache=cache).logits_BSV[0]


@pytest.mark.parametrize("window", [None, 12])
@torch.no_grad()
def test_logits_are_those_of_a_whole_pass(tokenizer, window):
    model, dice, kept = build(tokenizer, window), random.Random(0), KeptCache()
    ids: list[int] = []
    shared = []
    for turn in range(24):
        begun = ids[: len(ids) if turn % 2 else dice.randrange(len(ids) + 1)] if len(ids) < 120 else []
        ids = begun + dice.choices(range(3, 300), k=dice.randrange(1, 9))
        cache = kept.begin(model, ids, dice.randrange(len(ids), 200))
        assert cache.max_length >= len(ids)
        shared.append(cache.length)
        logits = feed(model, cache, ids)
        whole = model(torch.tensor([ids])).logits_BSV[0]
        torch.testing.assert_close(logits, whole[-len(logits) :], rtol=0, atol=1e-10)
        kept.end(cache, ids)
    assert sum(length > 0 for length in shared) >= (20 if window is None else 12)


def test_a_pass_that_was_interrupted_leaves_nothing(tokenizer):
    model, kept = build(tokenizer), KeptCache()
    ids = list(range(3, 20))
    cache = kept.begin(model, ids, 40)
    feed(model, cache, ids)
    cache.begin(1, None)
    kept.end(cache, ids)
    assert kept.begin(model, ids, 40).length == 0


@pytest.mark.parametrize("window", [None, 24])
def test_a_conversations_answers_are_those_of_new_ones(tokenizer, window):
    model = build(tokenizer, window)
    fed: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0].shape[1]))
    for template in (TemplateName.mistral, TemplateName.plain):
        asking = Asking.of(model, tokenizer, template, Sampling(temperature=0, max_new_tokens=8))
        talk, saved = Conversation(asking, "Be brief."), 0
        for number in range(8):  # more than the positions hold: turns are forgotten
            _, pieces = talk.ask(f"word {number} " * 5)
            fed.clear()
            if number == 3:  # the answer is read in part
                next(pieces)
                pieces.close()
                continue
            answer, messages = "".join(pieces), talk.messages()[:-1]
            prefilled = sum(fed)
            fed.clear()
            assert answer == "".join(piece.text for piece in asking.answers([messages]))
            saved += sum(fed) - prefilled
        assert saved > 100
        talk.system = None
        talk.reset()
        _, pieces = talk.ask("And now?")
        assert "".join(pieces) == "".join(piece.text for piece in asking.answers([talk.messages()[:-1]]))


def test_sampling_is_the_same(tokenizer):
    model, kept, settings = build(tokenizer), KeptCache(), Sampling(temperature=1.0, seed=3, max_new_tokens=6)
    begun = tokenizer.encode("Once upon a time")
    for text in ("there was", "there was a king", "no"):
        prompt = begun + tokenizer.encode(text)
        texts = [
            "".join(piece.text for piece in stream(model, tokenizer, [prompt], settings, kept=one))
            for one in (kept, None)
        ]
        assert texts[0] == texts[1]
