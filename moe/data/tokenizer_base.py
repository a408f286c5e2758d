"""What every tokenizer can do, and what is stored of one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from moe.data.readers import DataError

INFO_FILE = "moe_tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"  # transformers' name
PARTS = 8  # of a long text, encoded at once
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer(Protocol):
    """Every stored document begins with `bos_id` and ends with `eos_id`; ids are 0 … vocab_size − 1. `has_bos`: the
    tokenizer names a BOS, which may be its EOS; without one, `bos_id` is `eos_id`.

    `chat_template` is the Jinja text that turns messages into a prompt, if the tokenizer has one. It is saved beside
    the tokenizer; `fingerprint` is of the ids alone.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    has_bos: bool
    stripping: Mapping[str, tuple[bool, bool]]  # special token → whether other tools remove spaces before, behind it
    fingerprint: str
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without BOS and EOS; text that looks like a special token stays text."""
        ...

    def encode_many(self, texts: list[str]) -> list[list[int]]: ...

    def encode_raw(self, texts: list[str], behind_special: bool = False) -> list[bytes]:
        """As `encode_many`, with the ids of each text as they are in a shard: integers of `token_dtype`.
        `behind_special`: each text stands directly behind a special token of a longer text."""
        ...

    def encode_long(self, text: str) -> Iterator[list[int]]:
        """The ids of `encode`, part by part, so that memory doesn't grow with them (where the tokenizer allows it)."""
        ...

    def decode(self, ids: list[int]) -> str: ...

    def piece(self, token_id: int) -> str:
        """One id as readable text; `<0xE4>` for a byte that is only part of a character."""
        ...

    def special_tokens(self) -> dict[str, int]:
        """{text: id} of the tokens that stand for no text: what a chat template may name."""
        ...

    def token_bytes(self) -> np.ndarray:
        """[V] int64: the UTF-8 bytes of text that each id stands for; 0 for special tokens."""
        ...

    def files(self) -> dict[str, bytes]:
        """{file name: content}: the files that `load_saved` reads."""
        ...

    def save(self, folder: Path) -> None:
        """Writes `files` into `folder`."""
        ...


def bos_and_eos(bos: int | None, eos: int | None, where: str) -> tuple[int, int]:
    """(BOS, EOS); with a tokenizer that has no BOS, documents begin with EOS."""
    if eos is None or eos < 0:
        raise DataError(f"{where}: has no end-of-sequence token, which every document needs at its end")
    return (eos if bos is None or bos < 0 else bos), eos


def saved_files(tokenizer: Tokenizer, file_name: str, model: bytes) -> dict[str, bytes]:
    info = {"file": file_name, "fingerprint": tokenizer.fingerprint}
    info |= {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    info["has_bos"] = tokenizer.has_bos
    files = {file_name: model, INFO_FILE: (json.dumps(info, indent=1) + "\n").encode()}
    if tokenizer.chat_template is not None:
        files[TEMPLATE_FILE] = tokenizer.chat_template.encode()
    return files


def save_files(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
