"""Answers are those of generation from the template's tokens; turns are forgotten where they don't fit."""

import dataclasses

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
from moe.errors import UserError
from moe.inference.chat import Asking, Conversation, conversation
from moe.inference.generate import stream
from moe.model.transformer import Transformer

GREEDY = Sampling(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def tokenizer():
    return open_tokenizer(TokenizerConfig(kind=TokenizerKind.mistral))


@pytest.fixture(scope="module")
def model(tokenizer):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        initializer=Initializer.normal, initializer_range=0.3, max_position_embeddings=96,
    )  # fmt: skip
    made = Transformer(config, TopKRouterConfig(), ExpertsConfig())
    made.init_weights(0)
    return made.eval()


@pytest.fixture
def asking(model, tokenizer):
    return Asking.of(model, tokenizer, TemplateName.mistral, GREEDY)


@torch.no_grad()
def test_an_answer_is_the_greedy_continuation_of_the_prompt(asking, model, tokenizer):
    messages = conversation("Be brief.", "How?", "So.", "And now?")
    ids = [tokenizer.bos_id, *tokenizer.encode("[INST] Be brief.\n\nHow? [/INST] So.")]
    ids += [tokenizer.eos_id, *tokenizer.encode("[INST] And now? [/INST]")]
    assert asking.prompt(messages) == ids
    text = "".join(piece.text for piece in asking.answers([messages]))
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids])).logits_BSV[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_id:
            break
    new = [token for token in ids[len(asking.prompt(messages)) :] if token != tokenizer.eos_id]
    assert text == tokenizer.decode(new)


def test_several_conversations_answer_as_each_alone(asking):
    conversations = [conversation(None, "How?"), conversation("Be brief.", "Why is it so long a question?")]
    texts = ["", ""]
    for piece in asking.answers(conversations):
        texts[piece.prompt] += piece.text
    assert texts == ["".join(piece.text for piece in asking.answers([one])) for one in conversations]


def test_an_answer_ends_at_the_templates_token(model, tokenizer):
    """ChatML's <|im_end|>, where the sequence's end is another token."""

    class Marked:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def special_tokens(self):
            return tokenizer.special_tokens() | {"<|im_start|>": 10, "<|im_end|>": 11}

    asked = Asking.of(model, Marked(), TemplateName.chatml, GREEDY)
    assert asked.ends == {11}
    assert asked.lead == ""
    prompt = asked.prompt(conversation(None, "How?"))
    assert prompt[0] == 10
    [first, *_] = [int(model(torch.tensor([prompt])).logits_BSV[0, -1].argmax())]
    pieces = list(stream(model, tokenizer, [prompt], GREEDY, ends=frozenset((first,))))
    assert [(piece.text, piece.done) for piece in pieces] == [("", True)]


def test_turns_are_forgotten_where_they_dont_fit(asking):
    talk = Conversation(dataclasses.replace(asking, settings=Sampling(temperature=0, max_new_tokens=8)), "Be brief.")
    forgotten = []
    for number in range(6):
        count, pieces = talk.ask(f"word {number} " * 4)
        assert "".join(pieces) == talk.turns[-1]
        forgotten.append(count)
        assert len(asking.prompt(talk.messages()[:-1])) + 8 <= 96
    assert forgotten[0] == 0
    assert sum(forgotten) >= 4
    assert all(count % 2 == 0 for count in forgotten)
    before = list(talk.turns)
    with pytest.raises(UserError, match=r"the message has \d+ tokens with its template, and the model has"):
        talk.ask("word " * 200)
    assert talk.turns == before
    talk.reset()
    assert talk.messages() == [{"role": "system", "content": "Be brief."}]


def test_a_long_message_leaves_room_for_what_fits(asking):
    talk = Conversation(asking, None)
    _, pieces = talk.ask("word " * 75)
    assert list(pieces)


def test_a_tokenizer_without_a_template(model, tokenizer):
    assert tokenizer.chat_template is None
    with pytest.raises(UserError, match="has no chat template, so it was not trained on conversations"):
        Asking.of(model, tokenizer, TemplateName.tokenizer, GREEDY)
