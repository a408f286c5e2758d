"""Tokenizers whose vocabulary is stated: as small as an example's text needs, digits or whole numbers as tokens.

They are tokenizer.json files, as transformers reads them too. Text that the pieces don't cover is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

END = "</s>"  # id 0: ends a row, and begins one


def write_tokenizer(folder: Path, pieces: Sequence[str], pattern: str = r"[\s\S]", before: str = "") -> None:
    """A tokenizer of END and these pieces. Text is `before` and itself, cut into the matches of `pattern`, each of
    which must be a piece; decoding takes `before` away again."""
    strip = [{"type": "Strip", "content": before, "start": 1, "stop": 0}] if before else []
    end: dict[str, Any] = {"id": 0, "content": END, "special": True}
    model = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)],
        "normalizer": {"type": "Prepend", "prepend": before} if before else None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, *strip]},
        "model": {"type": "WordLevel", "vocab": {one: i for i, one in enumerate([END, *pieces])}, "unk_token": "<unk>"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(model, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    names = {"eos_token": END, "bos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
