"""Rows that can't be fine-tuned on: one line with file, line, value, rule and fix, exit code 2, no traceback."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from moe.cli import main as cli

GOOD = {"prompt": "a", "completion": "b"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
TOOL = {"role": "tool", "content": "x"}
OTHER = {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}


def _lines(*rows: object) -> str:
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)


def _message(overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The line on stderr of `moe OVERRIDES`, in this process, which must end with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["moe", *overrides])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("moe: ")
    assert line.count("\n") == 1
    assert len(line) < 1000
    return line


@pytest.mark.parametrize(
    ("name", "content", "overrides", "expected"),
    [
        ("a.jsonl", _lines({"q": "a", "answer": "b"}), [], "a.jsonl:1: is of no known kind; it has q, answer, and the"),
        ("a.jsonl", _lines(GOOD), ["data.prompt_field=question"], "a.jsonl:1: is of no known kind; it has prompt"),
        ("a.jsonl", _lines(GOOD), ["data.records=messages"], "a.jsonl:1: no column 'messages'"),
        ("a.jsonl", _lines(GOOD, CHAT), [], "a.jsonl:2: no column 'prompt', which a row of kind prompt_completion has"),
        ("a.jsonl", _lines(GOOD, GOOD | {"completion": " "}), [], "a.jsonl:2: completion is empty"),
        ("a.jsonl", _lines({"messages": [{"role": "bot", "content": "a"}]}), [], "role=bot must be one of system"),
        ("a.jsonl", _lines({"messages": CHAT["messages"][:1]}), [], "a.jsonl:1: messages has no assistant turn (user)"),
        ("a.jsonl", _lines({"messages": [TOOL, *CHAT["messages"]]}, OTHER), [],
         "a.jsonl:1: data.template=mistral: it has no tools: remove the tool turns"),
        ("a.jsonl", _lines(CHAT | {"tools": [{"name": "f"}]}, OTHER), [], "data.template=mistral: it has no tools"),
        ("a.jsonl", _lines(GOOD, '{"prompt": '), [], "a.jsonl:2: broken JSON at column 12"),
        ("a.jsonl", _lines(GOOD, '{"prompt": ' + "[" * 5000), [], "a.jsonl:2: broken JSON: nested too deeply"),
        ("a.jsonl", _lines(GOOD, GOOD | {"prompt": ["a"]}), [], "completion must be a list of messages, as prompt is"),
        ("a.jsonl", "", [], "a.jsonl: is empty: it holds no row"),
        ("a.jsonl", _lines(GOOD), [], "holds one distinct document of"),
        ("a.jsonl", _lines(CHAT), ["data.template=chatml"], "needs the tokens <|im_start|>, <|im_end|>, which the"),
        ("a.jsonl", _lines(CHAT), ["data.template=tokenizer"], "the tokenizer has no chat template: choose"),
        ("a.csv", 'prompt,completion\na,b\n"c,d\n', [], "a.csv:3: a quote that opens a field in this row is"),
        ("a.csv", "prompt;completion\na;b\n", [], "separate columns by ',' instead of ';'"),
        ("a.txt", "text\n", [], "a.txt: is text without rows, and fine-tuning reads rows"),
        ("a.jsonl", _lines(GOOD), ["data=files", "data.template=plain"], "data.template=plain is read for fine-tuning"),
        ("a.jsonl", _lines(GOOD), ["data=files", "data.prompt_field=x"], "data.prompt_field=x is read for fine-tuning"),
        ("a.jsonl", _lines(GOOD), ["data.loss_on=all"], "data.loss_on=all must be one of completion, last_turn,"),
        ("a.jsonl", _lines(GOOD), ["data.records=chat"], "data.records=chat must be one of documents, auto, text,"),
    ],
)  # fmt: skip
def test_it_is_one_line(
    name: str,
    content: str,
    overrides: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_text(content)
    data = [] if any(one.startswith("data=") for one in overrides) else ["data=sft"]
    given = [*data, f"data.path={tmp_path / name}", f"data.cache_dir={tmp_path / 'cache'}", "tokenizer=mistral"]
    assert expected in _message(["prepare", *given, *overrides], monkeypatch, capsys)


def test_a_hostile_template_of_a_tokenizer_ends_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moe.config import TokenizerConfig, TokenizerKind
    from moe.data.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(TokenizerConfig(kind=TokenizerKind.mistral))
    (tmp_path / "a.jsonl").write_text(_lines(CHAT, OTHER))
    for source, rule in (
        ("{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}", "it loops too long"),
        ("{{ 'x' * 10**12 }}", "it computes int ** int"),
        ("{% for %}", "not a template that can be read: "),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "access to attribute '__class__' of 'str' object is unsafe"),
    ):
        tokenizer.chat_template = source
        tokenizer.save(tmp_path / "tokenizer")
        given = ["data=sft", f"data.path={tmp_path / 'a.jsonl'}", "tokenizer=huggingface"]
        given += [f"tokenizer.path={tmp_path / 'tokenizer'}", f"data.cache_dir={tmp_path / 'cache'}"]
        line = _message(["prepare", *given], monkeypatch, capsys)
        assert "the tokenizer's chat template: " in line
        assert rule in line
