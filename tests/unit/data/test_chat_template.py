"""Chat templates: token for token those of mistral-common and transformers; what the model writes; nothing is lost, no
content makes a special token, and what can't be masked is refused."""

import json
import random
from typing import Any

import pytest

from moe.config import LongRows, LossOn, RecordKind, SourceConfig, TemplateName, TokenizerConfig, TokenizerKind
from moe.data.chat_template import ChatTemplate, Segment, open_template
from moe.data.chat_templates import CHATML, MISTRAL
from moe.data.readers import DataError
from moe.data.record_encoding import Recipe, encode_segments
from moe.data.records import parse, shape_of
from moe.data.tables import TableRow
from moe.data.tokenizer import open_tokenizer

MARKS = [
    "</s>", "<s>", "<|im_end|>", "<|im_start|>assistant\n", "[INST]", "[/INST]", " ", "  ", "\n", "\n\n", "\t", "'",
    '"', "{{ x }}", "{% if %}", "<unk>",
]  # fmt: skip
WORDS = ["hello", "Über", "日本語", "😀👍🏽", "x = 1", "1234", "é", "\u200b", "naïve", "code: `a`", *MARKS]
# ChatML without marks of what the model writes, as published models have it.
UNMARKED = """{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>'}}
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
USER = {"role": "user", "content": "how"}


def content(dice):
    return dice.choice(["", " "]).join(dice.choices(WORDS, k=dice.randrange(1, 8)))


def chat(dice, *, several=False):
    """A random conversation that ends with the assistant; with `several`, roles repeat, as mistral-common allows."""
    messages = [{"role": "system", "content": content(dice)}] if dice.random() < 0.4 else []
    for _ in range(dice.randrange(1, 5)):
        for role in ("user", "assistant"):
            times = dice.randrange(1, 3) if several and dice.random() < 0.3 else 1
            messages += [{"role": role, "content": content(dice) or "x"} for _ in range(times)]
    return [message | {"content": message["content"] if message["content"].strip() else "x"} for message in messages]


@pytest.fixture(scope="module")
def mistral():
    return open_tokenizer(TokenizerConfig(kind=TokenizerKind.mistral))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A byte-level tokenizer.json with ChatML's tokens and no BOS, as Qwen's has."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["hello there, how are you", "user assistant system\n\n", "x = 1\n\n\n"] * 20
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    folder = tmp_path_factory.mktemp("byte_level")
    backend.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "chat_template": UNMARKED, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def with_tokens(tokenizer, *names, strips=()) -> Any:
    """`tokenizer` with the special tokens `names`; spaces beside those in `strips` are removed elsewhere."""

    class Marked:
        def __init__(self) -> None:
            self.stripping = dict(strips)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def special_tokens(self):
            return tokenizer.special_tokens() | {name: number for number, name in enumerate(names, 100)}

    return Marked()


def encoded(template, messages, tokenizer):
    [(ids, turns)] = encode_segments([template.segments(messages, None, "row 1")], tokenizer)
    return ids.tolist(), turns.tolist()


def written(ids, turns, tokenizer):
    """The decoded tokens of each turn, without the one that ends it, which is asserted."""
    found = []
    for turn in range(max(turns) + 1):
        own = [token for token, number in zip(ids, turns, strict=True) if number == turn]
        assert own[-1] in tokenizer.special_tokens().values()
        found.append(tokenizer.decode(own[:-1]))
    return found


def test_mistral_is_mistral_commons_first_format_token_for_token(mistral):
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    from moe.data.tokenizer import tokenizer_files

    [path] = tokenizer_files(TokenizerConfig(kind=TokenizerKind.mistral))
    reference = MistralTokenizer.from_file(str(path), mode=ValidationMode.finetuning)
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    template = open_template(TemplateName.auto, mistral)
    dice = random.Random(0)
    for number in range(200):
        messages = chat(dice, several=number % 2 == 1)
        request = ChatCompletionRequest(messages=[kinds[m["role"]](content=m["content"]) for m in messages])
        expected = reference.encode_chat_completion(request).tokens
        assert encoded(template, messages, mistral)[0] == expected, messages


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_spaces_of_a_metaspace_tokenizer_are_transformers(tmp_path, scheme):
    """`prepend_scheme=first` (Mistral 7B v0.3) puts a space before a text's first word, and none behind its tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer

    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = {piece: number for number, piece in enumerate([*bytes_, "▁", *map(chr, range(33, 127))])}
    backend = Tokenizer(models.BPE(vocab=pieces, merges=[], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokens = ["<s>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    backend.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": UNMARKED}))

    ours = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(tmp_path)))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "so it is"}]
    expected = theirs.apply_chat_template(messages, tokenize=False)
    ids, turns = encoded(open_template(TemplateName.tokenizer, ours), messages, ours)
    assert ids == theirs(expected, add_special_tokens=False)["input_ids"]
    assert [number for number, turn in zip(ids, turns, strict=True) if turn == 0][-1] == ours.eos_id

    recipe = Recipe(open_template(TemplateName.plain, ours), ours, LossOn.everything, LongRows.truncate, 64)
    row = TableRow("a.jsonl:1", {"text": "how"})
    [row] = recipe.encode([parse(row, shape_of(row, "data", SourceConfig(), RecordKind.auto))])
    assert row.ids_T.tolist() == [ours.bos_id, *theirs("how", add_special_tokens=False)["input_ids"], ours.eos_id]


def test_a_text_behind_another_gets_no_space_in_front(tmp_path):
    """Where a token would cross from one into the next, and each is encoded alone."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces = {piece: number for number, piece in enumerate(["▁", "\n", "\n\n", "a", "b"])}
    backend = Tokenizer(models.BPE(vocab=pieces, merges=[("\n", "\n")], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False, rstrip=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(tmp_path)))
    assert {token for token, sides in tokenizer.stripping.items() if any(sides)} == {"</s>"}
    [(ids, turns)] = encode_segments([[Segment("a\n", None, -1), Segment("\nb", None, 0)]], tokenizer)
    assert [backend.id_to_token(token) for token in ids] == ["▁", "a", "\n", "\n", "b"]
    assert turns.tolist() == [-1, -1, -1, 0, 0]


def test_what_is_learnt_is_what_the_assistant_says(mistral, byte_level):
    other = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(byte_level)))
    dice = random.Random(1)
    for tokenizer, name in (
        (mistral, TemplateName.mistral), (mistral, TemplateName.plain), (other, TemplateName.mistral),
        (other, TemplateName.plain), (other, TemplateName.chatml), (other, TemplateName.tokenizer),
    ):  # fmt: skip
        template = open_template(name, tokenizer)
        for _ in range(40):
            messages = chat(dice)
            said = [message["content"] for message in messages if message["role"] == "assistant"]
            ids, turns = encoded(template, messages, tokenizer)
            lead = " " if name is TemplateName.mistral and tokenizer is other else ""  # between [/INST] and an answer
            exact = [lead + text for text in said]
            if tokenizer is mistral:  # its own normalisation
                plain = name is TemplateName.plain  # the answer goes on with the prompt's text: no space comes first
                exact = [text.removeprefix(" ") if plain else tokenizer.decode(tokenizer.encode(text)) for text in said]
            assert written(ids, turns, tokenizer) == exact


def test_byte_level_tokens_are_those_of_transformers(byte_level):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(byte_level))
    tokenizer = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(byte_level)))
    template = open_template(TemplateName.auto, tokenizer)
    assert template.name == "the tokenizer's chat template"
    dice = random.Random(2)
    compared = 0
    for _ in range(100):
        messages = chat(dice)
        if any(mark in message["content"] for message in messages for mark in ("<|im_start|>", "<|im_end|>")):
            continue  # transformers makes special tokens of them
        if any(message["role"] == "assistant" and message["content"][0].isspace() for message in messages):
            continue  # a prompt ends with a line's end, which the answer's whitespace isn't joined to here
        compared += 1
        assert encoded(template, messages, tokenizer)[0] == reference.apply_chat_template(messages)["input_ids"]
    assert compared >= 20


def test_marked_and_unmarked_templates_agree(byte_level):
    tokenizer = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(byte_level)))
    marked, unmarked = (ChatTemplate(source, tokenizer, "it") for source in (CHATML, UNMARKED))
    dice = random.Random(3)
    for _ in range(50):
        messages = chat(dice)
        assert encoded(marked, messages, tokenizer) == encoded(unmarked, messages, tokenizer)


def test_a_training_row_begins_with_the_prompt_that_generation_has(mistral, byte_level):
    other = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(byte_level)))
    dice = random.Random(4)
    for tokenizer, name in (
        (mistral, TemplateName.mistral),
        (other, TemplateName.chatml),
        (other, TemplateName.tokenizer),
    ):
        template = open_template(name, tokenizer)
        for _ in range(30):
            messages = chat(dice)
            ids, turns = encoded(template, messages, tokenizer)
            [(prompt, _)] = encode_segments([template.prompt(messages[:-1])], tokenizer)
            assert prompt.tolist() == ids[: turns.index(max(turns))]


def test_special_tokens_in_a_content_stay_text(mistral):
    template = open_template(TemplateName.mistral, mistral)
    messages = [{"role": "user", "content": "</s><s>[INST] do"}, {"role": "assistant", "content": "a</s>b<unk>"}]
    ids, turns = encoded(template, messages, mistral)
    assert ids.count(mistral.eos_id) == 1
    assert ids.count(mistral.bos_id) == 1
    assert written(ids, turns, mistral) == ["a</s>b<unk>"]


def test_a_literal_private_character_stays_itself(mistral):
    template = open_template(TemplateName.mistral, mistral)
    messages = [{"role": "user", "content": "\ue002</s>\ue003"}, {"role": "assistant", "content": "\ue002 </s>"}]
    ids, turns = encoded(template, messages, mistral)
    assert written(ids, turns, mistral) == ["\ue002 </s>"]
    with pytest.raises(DataError, match=r"row 1: holds the private character U\+E000"):
        template.segments([{"role": "user", "content": "\ue000"}], None, "row 1")


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("{{ messages[0]['content'] }}", "leaves out what message 1 (assistant) has, 'fine'"),
        (
            "{{ messages | map(attribute='content') | join(' ') | upper }}",
            "leaves out what message 0 (user) has, 'how'",
        ),
        ("{{ raise_exception('only dogs') }}", "it: only dogs"),
        ("{{ nothing.at.all }}", "it: 'nothing' is undefined"),
        (
            "{% for m in messages %}{{ messages|length }}{{ m.content }}{% endfor %}",
            "where the answer begins can't be told",
        ),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}", None),
    ],
)
def test_a_template_that_cant_be_masked_is_refused(mistral, source, rule):
    template = ChatTemplate(source, mistral, "it")
    messages = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "fine"}]
    if rule is None:
        assert not any(segment.turn >= 0 and segment.text for segment in template.segments(messages, None, "row 1"))
        return
    with pytest.raises(DataError) as caught:
        template.segments(messages, None, "a.jsonl:3")
    assert str(caught.value).startswith("a.jsonl:3: it")
    assert rule in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "tools", "rule"),
    [
        ([{"role": "tool", "content": "3"}, {"role": "assistant", "content": "x"}], None, "has no tools"),
        (
            [{"role": "user", "content": "u"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}],
            None,
            "has no tools",
        ),
        ([{"role": "user", "content": "u"}, {"role": "assistant", "content": "x"}], [{"name": "f"}], "has no tools"),
        (
            [*({"role": role, "content": role} for role in ("user", "assistant", "system", "user", "assistant"))],
            None,
            "a system message must not follow an assistant turn",
        ),
    ],
)
def test_mistral_refuses_what_it_has_no_form_for(mistral, messages, tools, rule):
    with pytest.raises(DataError, match=rule):
        open_template(TemplateName.mistral, mistral).segments(messages, tools, "a.jsonl:1")


def test_a_templates_tools_are_rendered_and_masked(byte_level):
    tokenizer = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(byte_level)))
    source = """{% if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
    template = ChatTemplate(source, tokenizer, "it")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "</call><|im_end|>"}}}
    messages = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "assistant", "content": "it is 3"},
    ]
    segments = template.segments(messages, [{"name": "add"}], "row 1")
    [(ids, turns)] = encode_segments([segments], tokenizer)
    expected = "<call>" + json.dumps(call["function"]) + "</call>"
    assert written(ids.tolist(), turns.tolist(), tokenizer) == [expected, "it is 3"]
    without = ChatTemplate(UNMARKED, tokenizer, "it")
    with pytest.raises(DataError, match="has tools, and it has no place for them"):
        without.segments([messages[0], messages[3]], [{"name": "add"}], "row 1")


@pytest.mark.parametrize(
    ("messages", "rule"),
    [
        (
            [USER, {"role": "assistant", "content": "wait"}, {"role": "tool", "content": "42"}],
            r"leaves out what message 2 \(tool\) has, '42'",
        ),
        (
            [USER | {"content": "please search"}, {"role": "assistant", "tool_calls": [{"name": "search"}]}],
            r"leaves out what message 1 \(assistant\) has, 'search'",
        ),
    ],
)
def test_what_another_message_has_too_is_not_left_out_silently(mistral, messages, rule):
    source = """{% if tools %}{{ tools | tojson }}
{% endif %}{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }}
{% elif m.role == 'assistant' %}ASSISTANT: {{ m.content or '' }}{{ eos_token }}
{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"""
    answer = {"role": "assistant", "content": "It is 42."}
    template = ChatTemplate(source, mistral, "it")
    tools = [{"type": "function", "function": {"name": "search"}}, "other"]
    for given in (None, tools):
        with pytest.raises(DataError, match=rule):
            template.segments([*messages, answer], given, "row 1")
        assert template.segments([messages[0], answer, USER, answer], given, "row 1")
    turned = "{% generation %}{% for m in messages | reverse %}{{ m.content }}{% endfor %}{% endgeneration %}"
    assert ChatTemplate(turned, mistral, "it").segments([USER, answer, USER, answer], None, "row 1")


def test_a_template_that_drops_earlier_thoughts_is_masked(byte_level):
    """As Qwen3's: only the last answer keeps what is before </think>."""
    tokenizer = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(byte_level)))
    source = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content.split('</think>')[-1] if not loop.last else m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
    messages = [
        *({"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>hm</think>b"}),
        *({"role": "user", "content": "c"}, {"role": "assistant", "content": "<think>so</think>d"}),
    ]
    ids, turns = encoded(ChatTemplate(source, tokenizer, "it"), messages, tokenizer)
    assert written(ids, turns, tokenizer) == ["b", "<think>so</think>d"]


def test_the_thought_of_the_answer_to_learn_is_never_left_out(byte_level):
    tokenizer = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(byte_level)))
    drops = UNMARKED.replace("m['content']", "m['content'].split('</think>')[-1]")
    thinks = {"role": "assistant", "content": "<think>so</think>d"}
    answers = {"role": "assistant", "content": "e"}
    template = ChatTemplate(drops, tokenizer, "it")
    with pytest.raises(DataError, match=r"row 1: it leaves out what message 1 \(assistant\) has, 'so': remove"):
        template.segments([USER, thinks], None, "row 1")
    with pytest.raises(DataError, match=r"leaves out what message 0 \(user\) has, 'how</think>x'"):
        template.segments([USER | {"content": "how</think>x"}, answers], None, "row 1")
    ids, turns = encoded(template, [USER, thinks, USER, answers], tokenizer)
    assert written(ids, turns, tokenizer) == ["d", "e"]
    assert "".join(one.text for one in template.prompt([USER, thinks, USER])).count("so") == 0
    row = TableRow("row 1", {"prompt": [USER, thinks, USER], "completion": [answers]})
    record = parse(row, shape_of(row, "data", SourceConfig(), RecordKind.auto))
    recipe = Recipe(template, tokenizer, LossOn.completion, LongRows.truncate, 64)
    assert [one.text for one in recipe.segments(record) if one.turn >= 0] == ["e", "<|im_end|>"]
    # As Qwen3's, which writes a thought in its own form, and begins one in the prompt.
    begins = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>
{{ m.content.split('</think>')[0].split('<think>')[-1] }}
</think>

{% endif %}{{ m.content.split('</think>')[-1] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
    ids, turns = encoded(ChatTemplate(begins, tokenizer, "it"), [USER, thinks], tokenizer)
    assert written(ids, turns, tokenizer) == ["so\n</think>\n\nd"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}"
            "assistant: {% else %}{{ eos_token }}{% endif %}",
            ["a\n\n", "b\n\n</s>"],
        ),
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}"
            "<|assistant|>{% else %}{{ eos_token }}{% endif %}",
            ["a", "b</s>"],
        ),
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}"
            "<|assistant|>{% else %}{{ eos_token }}{% endif %}",
            ["a<|end|>", "b<|end|>\n</s>"],
        ),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% if loop.last and m.role == 'assistant' %}."
            "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
            None,
        ),
    ],
)
def test_an_end_behind_the_whole_conversation_ends_no_earlier_turn(mistral, source, said):
    template = ChatTemplate(source, with_tokens(mistral, "<|user|>", "<|assistant|>", "<|end|>"), "it")
    messages = [USER, {"role": "assistant", "content": "a"}, USER, {"role": "assistant", "content": "b"}]
    if said is None:
        with pytest.raises(DataError, match="where the answer begins can't be told"):
            template.segments(messages, None, "row 1")
        return
    segments = template.segments(messages, None, "row 1")
    assert ["".join(one.text for one in segments if one.turn == turn) for turn in range(2)] == said
    prompt = template.prompt(messages[:-1])
    assert "".join(one.text for one in segments).startswith("".join(one.text for one in prompt))
    assert [one for one in prompt if one.turn == 0] == [one for one in segments if one.turn == 0]


def test_a_template_with_tokens_that_mean_more_elsewhere_is_refused(mistral):
    messages = [USER, {"role": "assistant", "content": "so"}]
    names = ("<|im_start|>", "<|im_end|>", "<|x|>")
    for name in ("pad_token", "unk_token", "additional_special_tokens"):
        template = ChatTemplate(
            "{% if x %}{{ " + name + " }}{% endif %}" + UNMARKED, with_tokens(mistral, *names), "it"
        )
        with pytest.raises(DataError, match=f"row 1: it writes {name}, and only bos_token and eos_token are known"):
            template.segments(messages, None, "row 1")
        assert template.answer_form() == ("", 101)  # for an export
    for source, token, sides, refused in (
        (UNMARKED, "<|im_end|>", (False, True), True),  # a line break is behind it
        (UNMARKED, "<|im_end|>", (True, False), False),
        (UNMARKED, "<|im_start|>", (True, False), True),
        (UNMARKED, "<|im_start|>", (False, True), False),
        (UNMARKED, "<|x|>", (True, True), False),
        (UNMARKED, "</s>", (True, True), False),
        ("{% for m in messages %}{{ m['content'] + ' ' + eos_token }}{% endfor %}", "</s>", (True, False), True),
        (CHATML, "<|im_end|>", (True, True), False),
    ):
        template = ChatTemplate(source, with_tokens(mistral, *names, strips={token: sides}), "it")
        if not refused:
            template.segments(messages, None, "row 1")
            continue
        with pytest.raises(DataError) as caught:
            template.segments(messages, None, "row 1")
        assert str(caught.value).startswith(f"row 1: it writes a space beside {token}, which removes it")


def test_a_tokenizer_without_the_templates_tokens_is_told_what_to_do(mistral):
    with pytest.raises(
        DataError, match=r"needs the tokens <\|im_start\|>, <\|im_end\|>, .* data.template=mistral needs"
    ):
        open_template(TemplateName.chatml, mistral)
    with pytest.raises(DataError, match="the tokenizer has no chat template: choose one of ours"):
        open_template(TemplateName.tokenizer, mistral)


def test_our_templates_are_rendered_alike_by_transformers(mistral):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled, dice = _compile_jinja_template(MISTRAL), random.Random(5)
    template = open_template(TemplateName.mistral, mistral)
    for _ in range(30):
        messages = chat(dice)
        text = compiled.render(messages=messages, bos_token="<s>", eos_token="</s>")
        assert text == "".join(segment.text for segment in template.segments(messages, None, "row 1"))


def test_no_conversation_escapes_the_rules(mistral, byte_level):
    """Random messages of every form: segments or a DataError, never another exception."""
    dice, good, call = random.Random(7), 0, {"function": {"name": "f", "arguments": {"a": [1, None]}}}
    other = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(byte_level)))
    templates = [open_template(TemplateName.mistral, mistral), open_template(TemplateName.tokenizer, other)]
    refused = []
    extras = [("name", "f"), ("tool_calls", [call]), ("x", {"</s>": 1.5})]
    for _ in range(400):
        turns = []
        for _ in range(dice.randrange(1, 6)):
            turn = {"role": dice.choice(["system", "user", "assistant", "tool"]), "content": content(dice)}
            turns.append(turn | dict(dice.sample(extras, dice.choice([0, 0, 0, 1]))))
        row = TableRow("row 1", {"messages": [*turns, {"role": "assistant", "content": content(dice)}]})
        for template in templates:
            try:
                record = parse(row, shape_of(row, "data", SourceConfig(), RecordKind.auto))
                segments = template.segments(record.messages, None, "row 1")
                good += any(segment.turn >= 0 for segment in segments)
            except DataError as error:
                refused.append(str(error))
    assert all(message.startswith("row 1: ") for message in refused)
    assert good > 100


PUBLISHED = {  # the forms of well-known families, shortened; and what ends a turn
    "llama3": (
        "{% for m in messages %}{% set c = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | "
        "trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|eot_id|>",
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% set role = 'model' if m.role == 'assistant' else "
        "m.role %}{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<end_of_turn>",
    ),
    "zephyr": (
        "{% for m in messages %}\n{% if m.role == 'user' %}\n{{ '<|user|>\n' + m.content + eos_token }}\n"
        "{% else %}\n{{ '<|assistant|>\n' + m.content + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        "</s>",
    ),
    "llama2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        "</s>",
    ),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_forms_are_masked(mistral, family):
    names = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>")
    source, end = PUBLISHED[family]
    template = ChatTemplate(source, with_tokens(mistral, *names), family)
    dice = random.Random(6)
    for _ in range(20):
        messages = [message for message in chat(dice) if message["role"] != "system"]
        segments = template.segments(messages, None, "row 1")
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        for turn, answer in enumerate(answers):
            own = [segment for segment in segments if segment.turn == turn]
            assert own[-1].text == end
            assert own[-1].token is not None
            assert "".join(segment.text for segment in own[:-1]).strip() == answer.strip()
        text = "".join(segment.text for segment in template.prompt(messages[:-1]))
        assert "".join(segment.text for segment in segments).startswith(text)
        assert not any(segment.turn == len(answers) - 1 for segment in template.prompt(messages[:-1]))
    if family == "gemma":
        with pytest.raises(DataError, match="row 7: gemma: roles must alternate"):
            template.segments([USER, USER, {"role": "assistant", "content": "x"}], None, "row 7")
