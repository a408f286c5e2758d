"""Decoding as tokens come: the text of decoding all at once, in time linear in their number, for every tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.config import TokenizerConfig, TokenizerKind
from moe.config.compose import load_config
from moe.config.generate import Sampling
from moe.data.tokenizer import Tokenizer, open_tokenizer
from moe.errors import UserError
from moe.inference.decoding import MOST_BEFORE, MOST_UNSETTLED, IncrementalDecoder
from moe.inference.generate import generate
from moe.model.transformer import Transformer
from moe.sparse import routers_of
from tests.unit.inference.test_generate import PROMPTS, TOKENIZER, Bytes, build, decoded, recomputed

TEXTS = [
    "def f(x):\n    return  x + 1\n\n\n\t\tend",
    "Ünïcödé, 日本語 and 🙂🙃 in one line — “quoted”",
    "  leading and trailing  ",
    " " * 200 + "x",
    "",
    "a\ufffdb\ufffd\ufffdc",
]


def _byte_level(folder: Path) -> Tokenizer:
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    made.train_from_iterator([*TEXTS, *TEXTS], vocab_size=320, special_tokens=["<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder)))


MAKERS: dict[str, Callable[[Path], Tokenizer]] = {
    "mistral": lambda _: open_tokenizer(TokenizerConfig(kind=TokenizerKind.mistral)),
    "byte-level": _byte_level,
}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return MAKERS[request.param](tmp_path_factory.mktemp("tokenizer"))


def streamed(tokenizer: Any, before: list[int], ids: list[int]) -> str:
    decoder = IncrementalDecoder(tokenizer, before)
    return "".join([*(decoder.add(token) for token in ids), decoder.end()])


def at_once(tokenizer: Any, before: list[int], ids: list[int]) -> str:
    return tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_it_is_the_text_of_decoding_all_at_once(tokenizer: Tokenizer, text: str, share: float) -> None:
    ids = tokenizer.encode(text)
    cut = int(share * len(ids))
    while tokenizer.decode(ids[:cut]).endswith("\ufffd"):
        cut -= 1  # a prompt is a text, whole characters
    assert streamed(tokenizer, ids[:cut], ids[cut:]) == at_once(tokenizer, ids[:cut], ids[cut:])


def test_random_tokens_too(tokenizer: Tokenizer) -> None:
    """Whole characters and ordinary tokens; bytes that make none are shown sooner or later, and never stop the text."""
    ordinary = [i for i in range(tokenizer.vocab_size) if "\ufffd" not in tokenizer.decode([i]) and tokenizer.piece(i)]
    for seed in range(20):
        picks = random.Random(seed)
        ids = picks.choices(ordinary, k=80)
        assert streamed(tokenizer, ids[:20], ids[20:]) == at_once(tokenizer, ids[:20], ids[20:])
        wild = [picks.randrange(tokenizer.vocab_size) for _ in range(80)]
        assert streamed(tokenizer, [], [*wild, *tokenizer.encode(" the end")]).endswith("the end")


class Counting(Bytes):
    decoded = 0

    def decode(self, ids: list[int]) -> str:
        self.decoded += len(ids)
        return super().decode(ids)


@pytest.mark.parametrize(
    "text",
    [b"plain words ", b" " * 12, b"\x82" * 12, bytes([0xE2]) * 12, "日本".encode() * 2],
    ids=lambda text: str(text[:6]),
)
def test_work_grows_with_the_number_of_tokens_not_its_square(text: bytes) -> None:
    tokenizer, count = Counting(), 20_000
    decoder = IncrementalDecoder(tokenizer, [])
    for token in (text * (count // len(text) + 1))[:count]:
        decoder.add(token)
    assert tokenizer.decoded < 6 * (MOST_BEFORE + MOST_UNSETTLED) * count


def test_generation_decodes_no_more_for_a_later_token() -> None:
    def decoded(count: int) -> int:
        tokenizer = Counting()
        generate(build(), tokenizer, ["a prompt"], Sampling(max_new_tokens=count, temperature=0, stop="\0never"))  # type: ignore[arg-type]
        return tokenizer.decoded

    assert decoded(400) < 6 * decoded(100)  # re-decoding the text each time: 16 times


def test_weights_that_hold_nan_give_one_line() -> None:
    from moe.inference.generate import NotFiniteError

    model = build()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.nan
    for temperature in (0, 1.0):
        with pytest.raises(NotFiniteError, match=r"^the model.s logits are not finite: its weights hold NaN"):
            generate(model, Bytes(), ["a"], Sampling(max_new_tokens=3, temperature=temperature))  # type: ignore[arg-type]


SMALL_MODEL = [
    "model.vocab_size=300", "tokenizer.vocab_size=300", "model.hidden_size=32", "model.intermediate_size=48",
    "model.num_hidden_layers=2", "model.initializer=normal", "model.initializer_range=0.3", "model.sliding_window=8",
]  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        ["router=lossfree", "model.n_shared_experts=1", "model.sparse_layers=every_2"],
        ["router=gumbel", "router.temperature=0.5"],
        ["router=group_limited", "router.scoring_func=sigmoid", "router.bias_update=sign"],
        ["router=noisy_topk", "router.layers.1.top_k=3"],
        ["router=switch"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_cached_generation_equals_recomputation_for_every_causal_router(overrides: list[str]) -> None:
    config = load_config([*SMALL_MODEL, *overrides])
    model = Transformer(config.model, config.router, config.experts)
    model.init_weights(0)
    for number, router in enumerate(routers_of(model)):
        for buffer in router.buffers():
            buffer.copy_(torch.linspace(-0.3, 0.3, 8).roll(number))
    model.double()
    expected = [decoded(recomputed(model, prompt, 24)) for prompt in PROMPTS]
    assert generate(model, TOKENIZER, PROMPTS, Sampling(max_new_tokens=24, temperature=0)) == expected


def test_no_text_is_generated_with_a_router_that_looks_ahead() -> None:
    config = load_config([*SMALL_MODEL, "router=expert_choice"])
    model = Transformer(config.model, config.router, config.experts)
    with pytest.raises(UserError, match=r"router.kind=expert_choice\) choose a token's experts by what follows"):
        generate(model, TOKENIZER, PROMPTS, Sampling(max_new_tokens=4))
