"""`moe chat` with lines of a file: answers, commands, one line about what is wrong."""

import io
import json

import pytest

from moe.config import TemplateName
from moe.config.chat import ChatConfig
from moe.config.compose import ConfigError, load_config
from moe.data.records import parse, shape_of
from moe.data.tables import TableRow
from moe.errors import shown
from moe.inference import terminal
from moe.inference.chat import Asking
from moe.inference.generate import TextPiece
from tests.unit.inference.test_chat import model, tokenizer  # noqa: F401  (fixtures)


@pytest.fixture
def talk(model, tokenizer, capsys):  # noqa: F811
    def run(*lines, **keys):
        settings = {"checkpoint": "x", "temperature": 0, "max_new_tokens": 6, "template": TemplateName.mistral} | keys
        out = io.StringIO()
        source = io.StringIO("".join(f"{line}\n" for line in lines))
        terminal.run_chat(ChatConfig(**settings), model, tokenizer, source, out)
        return out.getvalue(), capsys.readouterr().err

    return run


def test_every_line_is_answered_and_remembered(talk, tmp_path):
    path = tmp_path / "chat.jsonl"
    out, err = talk("How?", "", "Why?", f"/save {path}", "/reset", "How?", f"/save {path}")
    first, second, again = out.splitlines()
    assert first == again
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [message["content"] for message in rows[0]["messages"]] == ["How?", first, "Why?", second]
    assert len(rows[1]["messages"]) == 2
    assert err.count(f"(saved to {path})") == 2
    from moe.config import RecordKind, SourceConfig

    row = TableRow("here", rows[0])
    assert parse(row, shape_of(row, "data", SourceConfig(), RecordKind.auto)).messages == rows[0]["messages"]


def test_turns_without_an_answer_are_not_saved(talk, tmp_path, monkeypatch):
    path = tmp_path / "chat.jsonl"
    answers = iter(["", "So.", " "])
    monkeypatch.setattr(Asking, "answers", lambda *_: iter([TextPiece(0, next(answers), True)]))
    _, err = talk("How?", f"/save {path}", "Why?", "And?", f"/save {path}", system="Be brief.")
    assert err.splitlines() == [
        f"moe: /save {shown(str(path))}: no answer has any text",
        f"(saved to {path}; left out, as their answers are empty: 2 turns)",
    ]
    assert [message["content"] for message in json.loads(path.read_text())["messages"]] == ["Be brief.", "Why?", "So."]


def test_a_line_that_is_not_utf8_is_told_and_the_next_one_comes(model, tokenizer, capsys):  # noqa: F811
    out, source = io.StringIO(), io.TextIOWrapper(io.BytesIO(b"caf\xe9\nHow?\n"), "utf-8")
    settings = ChatConfig(checkpoint="x", temperature=0, max_new_tokens=6, template=TemplateName.mistral)
    terminal.run_chat(settings, model, tokenizer, source, out)
    assert capsys.readouterr().err == "moe: the line caf\\udce9 is not UTF-8: type it, or save it, as UTF-8\n"
    assert len(out.getvalue().splitlines()) == 1


def test_commands(talk):
    out, err = talk("/help", "/system Be brief.", "/nope", "/save", "/save x", "/quit", "never")
    assert out == f"{terminal.HELP}\n"
    assert err.splitlines() == [
        "moe: /nope: no such command; /help lists them",
        "moe: /save must be followed by a file, as in /save chat.jsonl",
        "moe: /save x: the conversation is empty",
    ]
    assert talk("How?", system="Be brief.")[0] == talk("/system Be brief.", "How?")[0]


def test_a_line_that_is_too_long_is_told_and_the_next_one_comes(talk):
    out, err = talk("word " * 300, "How?")
    assert len(out.splitlines()) == 1
    assert err.startswith("moe: the message has ")


def test_a_file_that_cant_be_written_ends_nothing(talk, tmp_path):
    out, err = talk("How?", f"/save {tmp_path}/none/a.jsonl", "Why?")
    assert len(out.splitlines()) == 2
    assert "can't be written: No such file or directory" in err


def test_keys():
    with pytest.raises(ConfigError, match="checkpoint='' must name a run directory"):
        load_config([], "chat", ChatConfig)
    with pytest.raises(ConfigError, match="device=tpu must be"):
        load_config(["checkpoint=x", "device=tpu"], "chat", ChatConfig)
    with pytest.raises(ConfigError, match=r"system=caf\\udce9 is not UTF-8"):
        load_config(["checkpoint=x", "system=caf\udce9"], "chat", ChatConfig)
