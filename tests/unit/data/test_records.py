"""Records: every kind becomes the same conversation; what is wrong with a row is one line with place, value and fix."""

import json
import random
from datetime import datetime

import pytest

from moe.config import RecordKind, SourceConfig
from moe.data.readers import DataError
from moe.data.records import parse, shape_of
from moe.data.survey import content_bytes, hash_of
from moe.data.tables import TableRow

Q, A = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}


def record(values, kind=RecordKind.auto, **keys):
    row = TableRow("a.jsonl:3", values)
    return parse(row, shape_of(row, "data", SourceConfig(**keys), kind))


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"prompt": "why?", "completion": "because"}, {}),
        ({"question": "why?", "sql": "because", "id": 7}, {"prompt_field": "question", "completion_field": "sql"}),
        ({"prompt": [Q], "completion": [A]}, {}),
        ({"messages": [Q, A]}, {}),
        ({"messages": [Q | {"tool_calls": None, "name": None}, A], "prompt": "x", "completion": "y"}, {}),
        ({"dialog": [Q, A]}, {"messages_field": "dialog"}),
        ({"instruction": "why?", "output": "because"}, {}),
        ({"instruction": "why?", "input": "", "output": "because"}, {}),
        ({"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because"}]}, {}),
        ({"messages": [{"from": "user", "value": "why?"}, {"from": "assistant", "value": "because"}]}, {}),
    ],
)
def test_every_kind_is_the_same_conversation(values, keys):
    found = record(values, **keys)
    assert found.messages == [Q, A]
    assert found.data == record({"messages": [Q, A]}).data
    assert found.text == "why?\nbecause"


def test_other_parts_of_a_row():
    alpaca = record({"instruction": "Add.", "input": "1, 2", "output": "3"})
    assert alpaca.messages[0]["content"] == "Add.\n\n1, 2"
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert record({"conversations": turns, "system": "Be brief."}).messages[0] == {
        "role": "system",
        "content": "Be brief.",
    }
    assert record({"text": "only text"}).body == "only text"
    assert record({"messages": [Q, A], "tools": '[{"name": "f"}]'}).tools == [{"name": "f"}]
    for none in (None, [], "", "null", "[]"):
        assert record({"messages": [Q, A], "tools": none}).tools is None


def test_a_prompt_of_messages_is_given():
    row = {"prompt": [Q, A, Q], "completion": [A], "tools": [{"name": "f"}]}
    found = record(row)
    assert (found.messages, found.given, found.tools) == ([Q, A, Q, A], 3, [{"name": "f"}])
    assert found.data != record({"messages": [Q, A, Q, A], "tools": row["tools"]}).data  # learns less
    assert record({"prompt": [Q], "completion": [A]}).given == 0


def test_the_hash_follows_what_a_message_says_and_the_content_all_of_it():
    plain = record({"messages": [Q, A]})
    assert plain.data == b'[{"content":"why?","role":"user"},{"content":"because","role":"assistant"}]'
    named = Q | {"tool_call_id": "1", "name": "f", "tool_calls": [{"name": "f"}]}
    kept = json.dumps([named, A], sort_keys=True, separators=(",", ":")).encode()
    assert record({"messages": [named, A]}).data == kept
    others = [{"id": 7}, {"id": 8}, {"at": datetime(2024, 1, 2)}, {"reasoning_content": "as it is"}]
    found = [record({"messages": [Q, A | other]}) for other in others]
    assert {hash_of(one) for one in found} == {hash_of(plain)}
    assert len({content_bytes(one, hash_of(one)) for one in [plain, *found]}) == 5  # other content: other shards
    assert [one.messages[1] for one in found] == [A | other for other in others]  # what the template has


def user(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"question": "a", "answer": "b"}, "is of no known kind; it has question, answer, and the kinds have "),
        ({}, "is of no known kind; it has none"),
        ({"prompt": "a", "completion": ""}, "completion is empty: there is nothing to learn"),
        ({"prompt": "a", "completion": " \n"}, "completion is empty"),
        ({"prompt": 3, "completion": "b"}, "prompt must be text, is a number"),
        ({"prompt": "a", "completion": None}, "completion must be text, is null"),
        ({"prompt": "\ud800", "completion": "b"}, "holds a lone surrogate (U+D800), which is not text"),
        ({"prompt": [Q], "completion": "b"}, "completion must be a list of messages, as prompt is, is a str"),
        ({"prompt": "a", "completion": [A]}, "prompt must be a list of messages, as completion is, is a str"),
        ({"prompt": [], "completion": [A]}, "prompt is empty: remove the row"),
        ({"prompt": [Q], "completion": []}, "completion is empty: remove the row"),
        ({"prompt": [Q, A], "completion": [A]}, "prompt ends with an assistant turn: move that turn into completion"),
        ({"prompt": [Q], "completion": [Q, A]}, "completion begins with a turn of role user: move that turn into prom"),
        ({"prompt": [Q], "completion": [A, Q]}, "completion ends with a turn of role user, which nothing answers"),
        ({"prompt": [{"role": "usr", "content": "a"}], "completion": [A]}, "prompt[0]: role=usr must be one of"),
        ({"instruction": [Q], "output": [A]}, "instruction must be text, is a list"),
        ({"text": " "}, "text is empty: remove the row"),
        ({"messages": "hello"}, "messages must be a list of messages, is a str"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["a"]}, "messages[0]: must be an object with role and content, is a str"),
        ({"messages": [Q, {"content": "x"}]}, "messages[1]: has no role; it has content"),
        ({"messages": [Q, {"role": "asistant", "content": "x"}]}, "role=asistant must be one of system, user"),
        ({"messages": [Q, {"role": ["user"], "content": "x"}]}, "messages[1]: role=a list must be one of"),
        ({"messages": [{"role": "user"}, A]}, "messages[0]: content must be text, is null"),
        ({"messages": [user([{"type": "text", "text": "a"}]), A]}, "messages[0]: content must be text, is a list"),
        ({"messages": [Q, {"role": "assistant", "content": ""}]}, "messages[1]: content is empty"),
        ({"messages": [Q]}, "messages has no assistant turn (user): nothing to learn; remove the row"),
        ({"messages": [Q, A, Q]}, "ends with a turn of role user, which nothing answers"),
        ({"messages": [Q, A], "tools": "{"}, "tools is text, but no JSON"),
        ({"messages": [Q, A], "tools": "[" * 600 + "]" * 600}, "tools is nested more than 64 levels deep"),
        ({"messages": [Q, A], "tools": [b"f"]}, "tools or names hold what JSON can't (Object of type bytes is not"),
        ({"messages": [Q | {"name": datetime(2024, 1, 2)}, A]}, "hold what JSON can't (Object of type datetime is not"),
        ({"messages": [Q | {"id": "\ud800"}, A]}, "holds a lone surrogate (U+D800), which is not text"),
        ({"messages": [Q, A | {"tool_calls": "f"}]}, "messages[1]: tool_calls must be a list of objects, each"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "conversations[0]: from=alien must be one of human"),
        ({"conversations": [Q, A]}, "conversations[0]: has no from; it has role, content: for role and content set"),
        ({"instruction": "a", "output": "b", "input": 3}, "input must be text, is a number"),
        ({"instruction": "a", "output": ""}, "output is empty"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(values, rule):
    with pytest.raises(DataError) as caught:
        record(values)
    message = str(caught.value)
    assert message.startswith("a.jsonl:3: ")
    assert rule in message
    assert message.isprintable()
    assert len(message) < 700


def test_a_row_of_another_kind_than_the_first_names_both():
    shape = shape_of(TableRow("a.jsonl:1", {"prompt": "a", "completion": "b"}), "data", SourceConfig(), RecordKind.auto)
    with pytest.raises(DataError) as caught:
        parse(TableRow("a.jsonl:2", {"messages": [Q, A]}), shape)
    assert "a.jsonl:2: no column 'prompt', which a row of kind prompt_completion has; it has messages" in str(
        caught.value
    )


def test_a_stated_kind_must_have_its_columns():
    with pytest.raises(DataError, match="no column 'messages', which a row of kind messages has; it has prompt"):
        record({"prompt": "a", "completion": "b"}, RecordKind.messages)


def test_no_value_escapes_the_rules():
    """Random JSON under every column: a record or a DataError, never another exception."""
    dice = random.Random(0)

    def value(depth=0):
        kind = dice.randrange(8 if depth < 3 else 5)
        if kind < 5:
            return dice.choice([None, True, 1.5, "", "text", "user", "assistant", "\udcff", 10**30])
        if kind == 5:
            return [value(depth + 1) for _ in range(dice.randrange(3))]
        names = ("role", "content", "from", "value", "tool_calls", "x")
        return {dice.choice(names): value(depth + 1) for _ in range(dice.randrange(4))}

    columns = ("prompt", "completion", "messages", "instruction", "input", "output", "conversations", "system", "tools",
               "text")  # fmt: skip
    good = 0
    for _ in range(5000):
        values = {name: value() for name in dice.sample(columns, dice.randrange(1, 5))}
        for kind in RecordKind:
            if kind is RecordKind.documents:
                continue
            try:
                record(values, kind)
                good += 1
            except DataError:
                continue
    assert good > 100
