"""Rows for fine-tuning: which columns each kind has, and a row as a text or as the messages of a conversation.

| kind | columns | becomes |
| --- | --- | --- |
| text | text | the text |
| prompt_completion | prompt, completion | user, assistant; lists of messages end to end; tools |
| messages | messages (a list of role and content), tools | as it is |
| alpaca | instruction, input (may be missing or empty), output | user (input behind a blank line), assistant |
| sharegpt | conversations (a list of from and value), system, tools | its roles under their usual names |
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moe.config import RecordKind, SourceConfig
from moe.data.readers import Chunk, DataError
from moe.data.rows import kind_of, listed
from moe.data.tables import DEEPEST, TableRow, too_deep
from moe.errors import shown

Message = dict[str, Any]  # role, content; of templates that know them also name, tool_calls, tool_call_id, or others
HASHED = frozenset(("role", "content", "name", "tool_calls", "tool_call_id"))
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip


@dataclass(slots=True)
class DataRecord(Chunk):
    """A row as a conversation, or as the text `body` where there are no `messages`. `data` is its canonical JSON, which
    its hash, and so its split, follows: the same conversation in other columns, or with another id or time in a message
    (`others`), has the same. The first `given` messages are a prompt, whose assistant turns are not learnt (0 where it
    has none)."""

    place: str = ""
    messages: list[Message] = field(default_factory=list)
    given: int = 0
    body: str = ""
    tools: list[Any] | None = None

    @property
    def text(self) -> str:
        """What is in it, to train a tokenizer on."""
        return "\n".join(str(message.get("content") or "") for message in self.messages) or self.body


@dataclass(frozen=True, slots=True)
class Shape:
    """A kind and its columns in this source; `key` is the source's, for messages."""

    kind: RecordKind
    key: str
    columns: tuple[str, ...]  # that every row has
    optional: tuple[str, ...] = ()


def shapes(key: str, config: SourceConfig) -> list[Shape]:
    """Every kind with this source's columns. A row of several kinds is of the first."""
    kind = RecordKind
    return [
        Shape(kind.messages, key, (config.messages_field or "messages",), ("tools",)),
        Shape(kind.sharegpt, key, (config.messages_field or "conversations",), ("system", "tools")),
        Shape(kind.prompt_completion, key, (config.prompt_field, config.completion_field), ("tools",)),
        Shape(kind.alpaca, key, ("instruction", "output"), ("input",)),
        Shape(kind.text, key, (config.text_field,)),
    ]


def shape_of(row: TableRow, key: str, config: SourceConfig, stated: RecordKind) -> Shape:
    """The kind of a source whose first row is `row`. Raises DataError where it is none."""
    known = shapes(key, config)
    if stated is RecordKind.auto:
        for shape in known:
            if all(name in row.values for name in shape.columns):
                return _sharegpt_under_another_name(shape, row, known)
        kinds = "; ".join(f"{shape.kind.name}: {', '.join(shape.columns)}" for shape in known)
        raise DataError(
            f"{row.place}: is of no known kind; it has {listed(list(row.values))}, and the kinds have {kinds}: rename "
            f"the columns, or set {key}.prompt_field and {key}.completion_field, {key}.messages_field or "
            f"{key}.text_field{row.hint}"
        )
    return next(shape for shape in known if shape.kind is stated)


def _sharegpt_under_another_name(shape: Shape, row: TableRow, known: list[Shape]) -> Shape:
    """`messages` whose turns have `from` and `value` is ShareGPT's kind."""
    turns = row.values[shape.columns[0]]
    if shape.kind is not RecordKind.messages or not (isinstance(turns, list) and turns and isinstance(turns[0], dict)):
        return shape
    if "role" in turns[0] or "from" not in turns[0]:
        return shape
    other = next(one for one in known if one.kind is RecordKind.sharegpt)
    return Shape(other.kind, other.key, shape.columns, other.optional)


def parse(row: TableRow, shape: Shape) -> DataRecord:
    """Raises DataError, one line with the row's place, where it is not of the kind `shape`."""
    try:
        if row.problem:
            raise DataError(row.problem)
        _columns(row, shape)
        record = READERS[shape.kind](row, shape)
    except DataError as error:
        raise DataError(f"{row.place}: {error}") from error
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        wrong = f"U+{ord(error.object[error.start]):04X}"
        raise DataError(f"{row.place}: holds a lone surrogate ({wrong}), which is not text") from error
    record.place = row.place
    return record


def _columns(row: TableRow, shape: Shape) -> None:
    for name in shape.columns:
        if name not in row.values:
            raise DataError(
                f"no column {shown(name)!r}, which a row of kind {shape.kind.name} has; it has "
                f"{listed(list(row.values))}: all rows of a source are of one kind: split the file by kind, or set "
                f"{shape.key}.records and the names of the columns{row.hint}"
            )


def _record(messages: list[Message], tools: list[Any] | None = None, given: int = 0) -> DataRecord:
    hashed = [{key: value for key, value in message.items() if key in HASHED} for message in messages]
    others = [{key: value for key, value in message.items() if key not in HASHED} for message in messages]
    content: Any = [hashed, tools, given] if given else [hashed, tools] if tools else hashed
    try:
        data, more = _json(content), _json(others, str) if any(others) else b""
    except TypeError as error:  # Parquet has times and bytes
        raise DataError(f"tool_calls, tools or names hold what JSON can't ({error}): write it as text") from error
    return DataRecord(data, others=more, messages=messages, tools=tools, given=given)


def _json(value: Any, default: Callable[[Any], str] | None = None) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=default).encode()


def _text(row: TableRow, shape: Shape) -> DataRecord:
    name = shape.columns[0]
    text = _string(name, row.values[name])
    if not text.strip():
        raise DataError(f"{shown(name)} is empty: remove the row")
    return DataRecord(text.encode(), body=text)


def _prompt_completion(row: TableRow, shape: Shape) -> DataRecord:
    """Two texts, or two lists of messages, as in TRL's conversational data sets."""
    kinds = {name: isinstance(row.values[name], list) for name in shape.columns}
    if not any(kinds.values()):
        return _pair(row, shape)
    for name, is_list in kinds.items():
        if not is_list:
            other = next(one for one, is_one in kinds.items() if is_one)
            raise DataError(
                f"{shown(name)} must be a list of messages, as {shown(other)} is, is {kind_of(row.values[name])}"
            )
    prompt, completion = (_messages(name, row.values[name], _message) for name in shape.columns)
    _check_prompt_completion(shape.columns, prompt, completion)
    given = len(prompt) if any(message["role"] == "assistant" for message in prompt) else 0
    return _record([*prompt, *completion], _tools(row.values.get("tools")), given)


def _check_prompt_completion(names: tuple[str, ...], prompt: list[Message], completion: list[Message]) -> None:
    for name, messages in zip(names, (prompt, completion), strict=True):
        if not messages:
            raise DataError(f"{shown(name)} is empty: remove the row, or fill it in")
    first, last = completion[0]["role"], prompt[-1]["role"]
    if last == "assistant":
        raise DataError(f"{shown(names[0])} ends with an assistant turn: move that turn into {shown(names[1])}")
    if first != "assistant":
        raise DataError(f"{shown(names[1])} begins with a turn of role {first}: move that turn into {shown(names[0])}")
    _check_turns(names[1], completion)


def _pair(row: TableRow, shape: Shape) -> DataRecord:
    prompt, completion = (_string(name, row.values[name]) for name in shape.columns)
    _not_empty(shape.columns[1], completion)
    return _record([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}])


def _alpaca(row: TableRow, shape: Shape) -> DataRecord:
    record, more = _pair(row, shape), row.values.get("input")
    if more is None or not (more := _string("input", more)).strip():
        return record
    prompt, answer = record.messages
    return _record([{"role": "user", "content": f"{prompt['content']}\n\n{more}"}, answer])


def _conversation(row: TableRow, shape: Shape) -> DataRecord:
    name = shape.columns[0]
    of_sharegpt = shape.kind is RecordKind.sharegpt
    messages = _messages(name, row.values[name], _sharegpt_message if of_sharegpt else _message)
    if of_sharegpt and (system := row.values.get("system")):
        messages.insert(0, {"role": "system", "content": _string("system", system)})
    _check_turns(name, messages)
    return _record(messages, _tools(row.values.get("tools")))


def _messages(name: str, turns: Any, read: Callable[[Any], Message]) -> list[Message]:
    if not isinstance(turns, list):
        raise DataError(f"{shown(name)} must be a list of messages, is {kind_of(turns)}")
    return [_read_turn(read, name, number, turn) for number, turn in enumerate(turns)]


def _check_turns(name: str, messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if not messages:
        raise DataError(f"{shown(name)} is empty: remove the row")
    if "assistant" not in roles:
        raise DataError(
            f"{shown(name)} has no assistant turn ({', '.join(roles[:8])}): nothing to learn; remove the row"
        )
    if roles[-1] != "assistant":
        raise DataError(f"{shown(name)} ends with a turn of role {roles[-1]}, which nothing answers: remove that turn")


def _read_turn(read: Callable[[Any], Message], name: str, number: int, turn: Any) -> Message:
    try:
        return read(turn)
    except DataError as error:
        raise DataError(f"{shown(name)}[{number}]: {error}") from error


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"must be an object with role and content, is {kind_of(turn)}")
    role = turn.get("role")
    if "role" not in turn:
        other = ": for from and value set data.records=sharegpt" if "from" in turn else ""
        raise DataError(f"has no role; it has {listed(list(turn))}{other}")
    if role not in ROLES:
        raise DataError(f"role={_shown(role)} must be one of {', '.join(ROLES)}")
    message = {key: value for key, value in turn.items() if value is not None}  # Parquet fills missing keys with null
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(map(_is_call, calls))):
        raise DataError("tool_calls must be a list of objects, each with a name, or a function that has one")
    if not (calls and message.get("content") is None):
        message["content"] = _string("content", turn.get("content"))
    if role == "assistant" and not calls:
        _not_empty("content", message["content"])
    if calls == []:
        del message["tool_calls"]
    return message


def _is_call(call: Any) -> bool:
    inner = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(inner, dict) and isinstance(inner.get("name"), str)


def _sharegpt_message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"must be an object with from and value, is {kind_of(turn)}")
    for key in ("from", "value"):
        if key not in turn:
            other = ": for role and content set data.records=messages" if "role" in turn else ""
            raise DataError(f"has no {key}; it has {listed(list(turn))}{other}")
    role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise DataError(f"from={_shown(turn['from'])} must be one of {', '.join(SHAREGPT_ROLES)}")
    content = _string("value", turn["value"])
    if role == "assistant":
        _not_empty("value", content)
    return {"role": role, "content": content}


def _tools(value: Any) -> list[Any] | None:
    if value == "":
        return None
    if isinstance(value, str):  # as data sets store schemas of many forms
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"tools is text, but no JSON ({error})") from error
    if value is None:
        return None
    if not isinstance(value, list):
        raise DataError(f"tools must be a list, is {kind_of(value)}")
    if too_deep(value):
        raise DataError(f"tools is nested more than {DEEPEST} levels deep")
    return value or None


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{shown(name)} must be text, is {kind_of(value)}")
    return value


def _not_empty(name: str, text: str) -> None:
    if not text.strip():
        raise DataError(f"{shown(name)} is empty: there is nothing to learn; remove the row, or fill it in")


def _shown(value: Any) -> str:
    return shown(value) if isinstance(value, str) else kind_of(value)


READERS: dict[RecordKind, Callable[[TableRow, Shape], DataRecord]] = {
    RecordKind.text: _text,
    RecordKind.prompt_completion: _prompt_completion,
    RecordKind.alpaca: _alpaca,
    RecordKind.messages: _conversation,
    RecordKind.sharegpt: _conversation,
}
