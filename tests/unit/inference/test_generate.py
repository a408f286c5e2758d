"""Generation: cached = uncached token for token, sampling rules, stopping, streaming, files, one-line errors."""

import io
import json

import pytest
import torch

from moe.config import ExpertsConfig, Initializer, Mlp, ModelConfig, TopKRouterConfig
from moe.config.compose import ConfigError, load_config
from moe.config.generate import GenerateConfig, Sampling
from moe.config.overrides import quote_texts
from moe.inference.command import read_prompts, run_generate
from moe.inference.generate import generate, sample_text, stream
from moe.inference.sampling import pick
from moe.model.transformer import Transformer


class Bytes:
    """A tokenizer of bytes: ids 0 … 255, BOS 256, EOS 257."""

    vocab_size, bos_id, eos_id, fingerprint = 258, 256, 257, "bytes"

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        assert max(ids, default=0) < self.vocab_size
        return bytes(token for token in ids if token < 256).decode(errors="replace")


TOKENIZER = Bytes()


def build(mlp=Mlp.sparse, window=None, **settings) -> Transformer:
    """Weights larger than usual, so that the text isn't one token for ever."""
    config = ModelConfig(
        mlp=mlp,
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        sliding_window=window,
        initializer=Initializer.normal,
        initializer_range=0.3,
        **settings,
    )
    model = Transformer(config, TopKRouterConfig(), ExpertsConfig())
    model.init_weights(0)
    return model


@torch.no_grad()
def recomputed(model: Transformer, prompt: str, count: int) -> list[int]:
    """Greedy decoding with no cache: the whole text again for every token."""
    model.eval()
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode(prompt)]
    new = []
    for _ in range(count):
        logits = model(torch.tensor([ids])).logits_BSV[0, -1, : TOKENIZER.vocab_size]
        new.append(int(logits.argmax()))
        if new[-1] == TOKENIZER.eos_id:
            break
        ids.append(new[-1])
    return new


def decoded(ids: list[int]) -> str:
    return TOKENIZER.decode(ids)


PROMPTS = ["a", "the longest prompt of the three", "middle one"]


@pytest.mark.parametrize("mlp", list(Mlp))
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("chunk", [512, 5])
def test_greedy_equals_recomputation(mlp, window, chunk):
    """A batch of prompts of different lengths, past the window (8 slots, up to 72 positions), prefilled in chunks."""
    model = build(mlp, window).double()
    settings = Sampling(max_new_tokens=40, temperature=0, prefill_chunk=chunk)
    expected = [recomputed(model, prompt, 40) for prompt in PROMPTS]
    assert len(set(expected[0])) > 5
    assert generate(model, TOKENIZER, PROMPTS, settings) == [decoded(ids) for ids in expected]


def test_greedy_equals_recomputation_in_float32():
    model = build(window=8)
    assert generate(model, TOKENIZER, ["one"], Sampling(max_new_tokens=30, temperature=0)) == [
        decoded(recomputed(model, "one", 30))
    ]


def test_a_text_depends_on_seed_and_index_only():
    model = build().double()
    settings = Sampling(max_new_tokens=20, temperature=1.5, seed=3)
    together = generate(model, TOKENIZER, PROMPTS, settings)
    assert generate(model, TOKENIZER, PROMPTS[:1], settings) == together[:1]
    assert generate(model, TOKENIZER, PROMPTS, settings) == together
    assert generate(model, TOKENIZER, PROMPTS, Sampling(max_new_tokens=20, temperature=1.5, seed=4)) != together


def picks(logits: list[float], ids=(), count: int = 4000, **settings) -> torch.Tensor:
    """Shares of each token among `count` picks."""
    generator = torch.Generator().manual_seed(0)
    chosen = [pick(torch.tensor(logits), set(ids), Sampling(**settings), generator) for _ in range(count)]
    return torch.bincount(torch.tensor(chosen), minlength=len(logits)) / count


LOGITS = [1.0, 3.0, 2.0, 0.0]


def test_temperature():
    torch.testing.assert_close(
        picks(LOGITS, temperature=2.0), torch.softmax(torch.tensor(LOGITS) / 2, 0), rtol=0, atol=0.03
    )
    assert picks(LOGITS, temperature=0)[1] == 1


def test_top_k():
    expected = torch.tensor([0.0, *torch.softmax(torch.tensor([3.0, 2.0]), 0), 0.0])
    torch.testing.assert_close(picks(LOGITS, temperature=1.0, top_k=2), expected, rtol=0, atol=0.03)
    assert picks(LOGITS, temperature=1.0, top_k=99, count=400).count_nonzero() == 4


def test_top_p_keeps_the_fewest_tokens_that_hold_the_share():
    probabilities = torch.softmax(torch.tensor(LOGITS), 0)  # 0.087 0.644 0.237 0.032
    assert picks(LOGITS, temperature=1.0, top_p=0.6)[1] == 1
    assert picks(LOGITS, temperature=1.0, top_p=0.7).nonzero().flatten().tolist() == [1, 2]
    assert picks(LOGITS, temperature=1.0, top_p=0.9).nonzero().flatten().tolist() == [0, 1, 2]
    torch.testing.assert_close(picks(LOGITS, temperature=1.0, top_p=1.0), probabilities, rtol=0, atol=0.03)


def test_top_p_is_a_share_of_what_top_k_left():
    """0.644 is 73 % of the two that top_k leaves: enough for 0.7, though it isn't 70 % of all."""
    assert picks(LOGITS, temperature=1.0, top_k=2, top_p=0.7)[1] == 1


@pytest.mark.parametrize("temperature", [1e-320, 1e-300, 1e-39])
@pytest.mark.parametrize("logits", [[1.0, 3.0, 2.0], [-3.0, -1.0, -2.0], [-1.0, 0.0, -1.0], [0.0, 3e38, 1e38]])
def test_a_temperature_below_float32s_range_is_almost_0(temperature, logits):
    assert picks(logits, temperature=temperature, count=20)[1] == 1


def test_a_temperature_above_all_logits_makes_all_equal():
    assert picks([1.0, 3.0], temperature=1e37)[0] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("top_p", [1e-320, 1e-300, 1e-38])
def test_a_top_p_of_almost_0_keeps_one_token(top_p):
    assert picks(LOGITS, temperature=1.0, top_p=top_p, count=20)[1] == 1


@pytest.mark.parametrize(("penalty", "expected"), [(1e37, 2), (1e-37, 0)])
def test_the_largest_and_smallest_penalty_decide_alone(penalty, expected):
    for temperature in (0, 1e-3, 1.0):
        shares = picks([5.0, -1.0, 1.0], [0, 1], temperature=temperature, repetition_penalty=penalty, count=50)
        assert shares[expected] > 0.5, temperature
    assert picks([0.0, 1.0], [0], temperature=1.0, repetition_penalty=penalty, count=50).sum() == 1


def test_the_largest_seed_is_a_seed():
    generate(build(), TOKENIZER, ["a"], Sampling(max_new_tokens=2, seed=2**64 - 1))


def test_repetition_penalty_lowers_both_signs():
    logits = torch.tensor([2.0, -1.0, 1.5, -1.5])
    before = logits.clone()
    generator = torch.Generator()
    assert pick(logits, {0}, Sampling(temperature=0, repetition_penalty=2.0), generator) == 2
    assert pick(logits, {0, 2}, Sampling(temperature=0, repetition_penalty=4.0), generator) == 0
    assert pick(torch.tensor([-1.0, -1.5]), {0}, Sampling(temperature=0, repetition_penalty=2.0), generator) == 1
    assert torch.equal(logits, before)


class Scripted(torch.nn.Module):
    """A model whose next token is given: [batch][step]."""

    def __init__(self, *texts: list[int]) -> None:
        super().__init__()
        self.real, self.texts, self.calls = build(), texts, 0
        self.config, self.device, self.dtype = self.real.config, self.real.device, self.real.dtype
        self.is_causal = True

    def forward(self, ids, **keywords):
        output = self.real(ids, **keywords)
        output.logits_BSV.zero_()
        for row, text in enumerate(self.texts):
            output.logits_BSV[row, -1, text[self.calls]] = 50.0
        self.calls += 1
        return output


def test_end_of_document_ends_a_text_and_the_batch():
    end = TOKENIZER.eos_id
    model = Scripted([*b"ab", end, *b"xxxx"], [*b"cdef", end, *b"xx"])
    assert generate(model, TOKENIZER, ["1", "2"], Sampling(max_new_tokens=7, temperature=0)) == ["ab", "cdef"]
    assert model.calls == 5  # the prompt and four tokens: nothing is computed after the last text has ended


def test_all_steps_are_made_when_ranks_share_experts():
    model = Scripted([*b"ab", TOKENIZER.eos_id, *b"xxxx"])
    assert sample_text(model, TOKENIZER, "1", 7) == "ab"
    assert model.calls == 7


def test_stop_text_is_never_shown():
    """Its beginning is held back until it is clear that the rest doesn't follow."""
    model = Scripted(list(b"one\n\rtwo\n\n#three"))
    settings = Sampling(max_new_tokens=16, temperature=0, stop="\n\n#")
    pieces = list(stream(model, TOKENIZER, ["p"], settings))
    assert [piece.text for piece in pieces] == ["o", "n", "e", "\n\r", "t", "w", "o", ""]
    assert [piece.done for piece in pieces] == [False] * 7 + [True]


def test_characters_are_streamed_whole():
    model = Scripted([*"aé€".encode(), *b"!"])
    pieces = [piece.text for piece in stream(model, TOKENIZER, ["p"], Sampling(max_new_tokens=7, temperature=0))]
    assert pieces == ["a", "é", "€", "!"]


def test_broken_characters_show_at_the_end():
    model = Scripted([*b"a", 0xE2, 0x82])
    assert generate(model, TOKENIZER, ["p"], Sampling(max_new_tokens=3, temperature=0)) == ["a\ufffd"]


def test_tokens_the_tokenizer_lacks_are_never_chosen():
    model = build(mlp=Mlp.dense)
    with torch.no_grad():
        model.lm_head.weight[258:] = 100 * model.lm_head.weight[258:]
    generate(model, TOKENIZER, ["p"], Sampling(max_new_tokens=8, temperature=2.0))  # decode refuses them


def test_the_mode_comes_back():
    model = build()
    model.train()
    generate(model, TOKENIZER, ["p"], Sampling(max_new_tokens=2))
    assert model.training


def test_one_prompt_streams_and_a_file_becomes_json_lines(tmp_path):
    model, out = build(), io.StringIO()
    settings = {"checkpoint": "x", "max_new_tokens": 6, "temperature": 0.0}
    expected = generate(model, TOKENIZER, PROMPTS, Sampling(max_new_tokens=6, temperature=0))
    run_generate(GenerateConfig(prompt="a", **settings), model, TOKENIZER, out)
    assert out.getvalue() == "a" + expected[0] + "\n"
    file, out = tmp_path / "prompts.txt", io.StringIO()
    file.write_text("\n\n".join(PROMPTS) + "\n")
    run_generate(GenerateConfig(prompts_file=str(file), batch_size=2, **settings), model, TOKENIZER, out)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert lines == [{"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, expected, strict=True)]


def test_a_prompt_that_is_refused_is_not_written():
    out = io.StringIO()
    config = GenerateConfig(checkpoint="x", prompt="abc", max_new_tokens=9)
    with pytest.raises(ValueError, match=r"must be ≤ model\.max_position_embeddings=11"):
        run_generate(config, build(max_position_embeddings=11), TOKENIZER, out)
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"abc\xff", "byte 3 isn't UTF-8"), (b" \n\n", "has no prompt")],
)
def test_a_bad_prompts_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^prompts_file=.*prompts.txt: .*{message}"):
        read_prompts(path)


def test_a_sample_of_a_prompt_that_is_too_long_continues_its_end():
    model, prompt = build(max_position_embeddings=11), "abcdefghijk"
    for size in (1, 4):
        settings = Sampling(max_new_tokens=11 - size, temperature=0)
        pieces = stream(model, TOKENIZER, [TOKENIZER.encode(prompt[-size:])], settings)
        assert sample_text(model, TOKENIZER, prompt, 11 - size) == "".join(piece.text for piece in pieces)
    assert [sample_text(model, TOKENIZER, "abc", 7)] == generate(model, TOKENIZER, ["abc"], settings)


def test_lengths_and_vocabularies_that_do_not_fit():
    with pytest.raises(ValueError, match=r"3 prompt tokens \+ max_new_tokens=9 must be ≤ model.max_position_emb.*=11"):
        generate(build(max_position_embeddings=11), TOKENIZER, ["ab"], Sampling(max_new_tokens=9))
    config = ModelConfig(vocab_size=257)
    with pytest.raises(ValueError, match=r"the tokenizer's 258 pieces must be ≤ model.vocab_size=257"):
        generate(Transformer(config, TopKRouterConfig(), ExpertsConfig()), TOKENIZER, ["a"], Sampling())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompt=a"], "checkpoint='' must name"),
        (["checkpoint=x"], "prompt=None and prompts_file=None: exactly one"),
        (["checkpoint=x", "prompt=a", "prompts_file=b"], "prompt=a and prompts_file=b: exactly one"),
        (["checkpoint=x", "prompt=caf\udce9"], r"prompt=caf\\udce9 is not UTF-8: type it, or save it, as UTF-8"),
        (["checkpoint=x", "prompt=a", "stop=\udce9"], r"stop=\\udce9 is not UTF-8"),
        (["checkpoint=x", "prompt=a", "temperature=-1"], "temperature=-1.0 must be ≥ 0"),
        (["checkpoint=x", "prompt=a", "top_p=0"], "top_p=0.0 must be in"),
        (["checkpoint=x", "prompt=a", "top_k=0"], "top_k=0 must be > 0"),
        (["checkpoint=x", "prompt=a", "max_new_tokens=0"], "max_new_tokens=0 must be > 0"),
        (["checkpoint=x", "prompt=a", "repetition_penalty=0"], "repetition_penalty=0.0 must be > 0"),
        (["checkpoint=x", "prompt=a", "repetition_penalty=1e308"], r"repetition_penalty=1e\+308 must be ≤ 1e\+37"),
        (["checkpoint=x", "prompt=a", "temperature=inf"], r"temperature=inf must be ≤ 1e\+37"),
        (["checkpoint=x", "prompt=a", "max_new_tokens=1000000000000"], "max_new_tokens=10+ must be ≤ 10+"),
        (["checkpoint=x", "prompt=a", "seed=-1"], "seed=-1 must be ≥ 0"),
        (["checkpoint=x", "prompt=a", f"seed={2**64}"], f"seed={2**64} must be ≤ {2**64 - 1}"),
        (["checkpoint=x", "prompt=a", "tempreature=1"], "tempreature"),
        (["checkpoint=x", "prompt=a", "seed=one"], "seed"),
    ],
)
def test_bad_keys_are_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(overrides, "generate", GenerateConfig)
    assert "\n" not in str(caught.value)


def test_the_shipped_defaults_compose():
    config = load_config(["checkpoint=x", "prompt=a", "top_k=5"], "generate", GenerateConfig)
    assert config == GenerateConfig(checkpoint="x", prompt="a", top_k=5)


@pytest.mark.parametrize(
    "text",
    [
        "def ",
        "Once, twice",
        "x=[1, {2}]",
        "it's",
        "'half",
        "a\\",
        "\\'",
        "${HOME}",
        "\\${x}",
        "two\nlines",
        "é 🙂",
        "1",
        "true",
    ],
)
def test_a_prompt_arrives_as_it_was_typed(text):
    overrides = quote_texts(["checkpoint=x", f"prompt={text}", f"stop={text}"])
    config = load_config(overrides, "generate", GenerateConfig)
    assert (config.prompt, config.stop) == (text, text)


def test_quoted_prompts_and_null_stay_hydras():
    overrides = ["checkpoint=x", "prompt='a b '", "stop=null", "prompts_file=null"]
    assert quote_texts(overrides) == overrides
    assert load_config(overrides, "generate", GenerateConfig).prompt == "a b "
