"""The corpus of the training stage: text, tokenizer and shards in one folder that can be copied to another machine.

    python -m moe.bench.gpu.data FOLDER        writes FOLDER/data

The shard cache is keyed by the contents of the text and the tokenizer, so that it is found at any path and nothing is
tokenized again.
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
PIECES, BYTES = 4096, 1_000_000  # the tokenizer's vocabulary (model=small's vocab_size), and the text's size
TINY_PIECES, TINY_BYTES = 320, 60_000


def overrides(folder: Path) -> list[str]:
    """Overrides of `moe train` that use the data which `write` put into `folder`."""
    return [
        *("data=files", f"data.path={folder / TEXT}", f"data.cache_dir={folder / CACHE}"),
        *("tokenizer=model_file", f"tokenizer.path={folder / TOKENIZER}"),
    ]


def find_or_write(settings: Settings) -> Path:
    """A writable copy of the data that came with the wheels; if there is none, data prepared here."""
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
    """Writes English prose from Python's standard library, a tokenizer trained on it, and the shards."""
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
