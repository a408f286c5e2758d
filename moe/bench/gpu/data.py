"""The corpus of the training stage: text, its tokenizer and its shards in one folder, so that it can travel.

    python -m moe.bench.gpu.data FOLDER        writes FOLDER/data

Shards are found by the content of the text and the tokenizer, so they are found on another machine too, at another
path: nothing is tokenized there.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from moe.bench.gpu.settings import Settings
from moe.config.compose import load_config
from moe.data import stdlib
from moe.data.prepare import prepare

TEXT, TOKENIZER, CACHE = "corpus.jsonl", "tokenizer.model", "cache"
PIECES, BYTES = 4096, 1_000_000  # of the tokenizer (as many as model=small has rows for), and of text
TINY_PIECES, TINY_BYTES = 320, 60_000


def overrides(folder: Path) -> list[str]:
    """Of `moe train`, for the data that `write` left in `folder`."""
    return [
        *("data=files", f"data.path={folder / TEXT}", f"data.cache_dir={folder / CACHE}"),
        *("tokenizer=model_file", f"tokenizer.path={folder / TOKENIZER}"),
    ]


def find_or_write(settings: Settings) -> Path:
    """The data that came with the wheels, copied to where it may be written; else the same kind of data made here."""
    folder = Path(settings.work) / "data"
    came = Path(settings.folder) / "data"
    if settings.folder and came.is_dir():
        shutil.copytree(came, folder, dirs_exist_ok=True)
    elif settings.dry_run:
        write(folder, pieces=TINY_PIECES, max_bytes=TINY_BYTES)
    else:
        write(folder)
    return folder


def write(folder: Path, *, pieces: int = PIECES, max_bytes: int = BYTES) -> None:
    """English reference prose that every Python carries, a tokenizer trained on it, and the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    size = 0
    with (folder / TEXT).open("w", encoding="utf-8") as file:
        for text in stdlib.documents("prose"):
            size += file.write(json.dumps({"text": text}) + "\n")
            if size >= max_bytes:
                break
    with tempfile.TemporaryDirectory() as cache:
        text = ["data=files", f"data.path={folder / TEXT}", f"data.cache_dir={cache}"]
        config = load_config([*text, "model=small", f"tokenizer.vocab_size={pieces}"])
        corpus = prepare(config.data, config.tokenizer)
        shutil.copy(corpus.folder / "tokenizer" / TOKENIZER, folder / TOKENIZER)
    config = load_config([*overrides(folder), "model=small"])
    print(prepare(config.data, config.tokenizer).describe())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m moe.bench.gpu.data FOLDER")
    write(Path(sys.argv[1]) / "data")
