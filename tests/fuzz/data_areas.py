"""The cases that concern data: files of all formats, folders with links and what is no file, tokenizers."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet

from tests.fuzz.mutate import ODD, changed, mutated, odd
from tests.fuzz.run import Case

PLAIN = "some plain text of a few words " * 5
SUFFIXES = [".jsonl", ".jsonl", ".json", ".ndjson", ".csv", ".csv", ".tsv", ".parquet", ".parquet", ".txt"]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.Codec("zstd").compress(content, asbytes=True),
}
OTHERS = [".html", ".pdf", ".docx", ".zip", ".tar.gz", ".png", ".pkl", ".pt", ".arrow", ".lz4", ".unknown", ""]
SMALL = ["data.cache_dir=cache", "tokenizer.vocab_size=300"]


def tokenizer(random_: random.Random, folder: Path, done: Path) -> Case:
    """A SentencePiece model or a tokenizer.json with changed bytes or values, or something else in its place."""
    kind = random_.choice(["model_file", "model_file", "huggingface"])
    name = "t.model" if kind == "model_file" else "tokenizer.json"
    source = "tokenizer.model" if kind == "model_file" else name
    content, path = (done.parent / source).read_bytes(), folder / name
    match random_.randrange(10):
        case 0:
            os.mkfifo(path)
        case 1:
            path.symlink_to(random_.choice(["/dev/zero", "/nowhere", ".", name]))
        case 2 | 3 | 4 if kind == "model_file":  # a byte within the pieces
            data = bytearray(content)
            data[random_.randrange(len(data))] = random_.randrange(256)
            path.write_bytes(data)
        case 2 | 3 | 4 | 5 if kind == "huggingface":
            path.write_bytes(changed(random_, content))
        case _:
            path.write_bytes(mutated(random_, content))
    if kind == "huggingface":
        card = json.dumps({"bos_token": "<s>", "eos_token": "</s>"}).encode()
        card = random_.choice([card, card, mutated(random_, card), changed(random_, card)])
        (folder / "tokenizer_config.json").write_bytes(card)
        path = folder
    data = ["data=files", f"data.path={done.parent / 'text'}", "data.held_out=0.2", "data.cache_dir=cache"]
    words = [f"tokenizer={kind}", f"tokenizer.path={path}"]
    vocabulary = random_.choice([[], ["model.vocab_size=100000"]])
    return Case("tokenizer", kind, ["prepare", *data, *words, *vocabulary])


def rows(random_: random.Random, folder: Path, done: Path) -> Case:
    """One file of any format with odd rows or changed bytes, compressed or not; what is no text must fail."""
    suffix = random_.choice(SUFFIXES)
    content = _table(random_, suffix, done)
    if random_.random() < 0.4:
        content = mutated(random_, content)
    name = f"rows{suffix}"
    if random_.random() < 0.25:
        ending = random_.choice([*COMPRESS])
        content, name = COMPRESS[ending](content), name + ending
        if random_.random() < 0.5:
            content = mutated(random_, content)
    must_fail = False
    if random_.random() < 0.1:
        name = f"rows{random_.choice(OTHERS)}"
        must_fail = name not in ("rows.unknown", "rows")
    path = folder / name
    path.write_bytes(content)
    stated = [f"data.format={random_.choice(['text', 'csv', 'jsonl'])}"]
    keys = random_.choice([[], [], ["data.text_field=body"], stated])
    must_fail = must_fail and keys is not stated
    return Case("rows", name, ["prepare", "data=files", f"data.path={path}", *keys, *SMALL], must_fail=must_fail)


def _table(random_: random.Random, suffix: str, done: Path) -> bytes:
    texts = [random_.choice([*ODD, PLAIN, PLAIN, PLAIN + "x" * 200_000]) for _ in range(random_.randrange(30))]
    names = random_.choice([["text"], ["text", "id"], ["body", "text"], ["text", "text"], [odd(random_), "text"]])
    if suffix == ".parquet":
        return _parquet(random_, texts, names, done)
    if suffix in (".csv", ".tsv"):
        written = io.StringIO(newline="")
        delimiter = random_.choice([",", ";"]) if suffix == ".csv" else "\t"
        writer = csv.writer(written, delimiter=delimiter, lineterminator=random_.choice(["\n", "\r\n", "\r"]))
        writer.writerow(names)
        for text in texts:
            writer.writerow([text] * (len(names) + (random_.random() < 0.01)))
        lines = written.getvalue() + random_.choice(["", "", '"', "\n\n", "a,b,c,d"])
        return random_.choice([b"", b"", b"\xef\xbb\xbf"]) + lines.encode("utf-8", "surrogatepass")
    if suffix == ".txt":
        return "\n".join(texts).encode(random_.choice(["utf-8", "utf-8", "utf-16"]), "surrogatepass")
    if random_.random() < 0.1:
        return json.dumps([{"text": text} for text in texts], indent=random_.choice([None, 1])).encode()
    lines = [
        random_.choice(
            [json.dumps({name: text for name in names})] * 20
            + [json.dumps([text]), text.replace("\n", " "), f'{{"id": {"9" * 6000}, "text": "a"}}', "[" * 3000]
            + [f'{{"text": {"9" * 6000}}}', '{"\\ud800": "a"}', '{"text": "\\ud800"}', '{"text":"a","text":"b"}']
            + ['{"a":' * 5000, "NaN", '{"text": "a\\u0000b"}']
        )
        for text in texts
    ]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _parquet(random_: random.Random, texts: list[str], names: list[str], done: Path) -> bytes:
    if random_.random() < 0.4:
        return mutated(random_, (done.parent / "rows.parquet").read_bytes())
    raw = pyarrow.array([text.encode("utf-8", "surrogatepass") for text in texts], pyarrow.binary())
    column = random_.choice(
        [
            lambda: pyarrow.Array.from_buffers(pyarrow.string(), len(texts), raw.buffers()),  # not checked
            lambda: raw,
            lambda: pyarrow.array([{"text": "a"}] * len(texts)),
            lambda: pyarrow.array([None] * len(texts), pyarrow.string()),
            lambda: pyarrow.array(["plain", PLAIN] * 20).dictionary_encode(),
        ]
    )()
    written = io.BytesIO()
    parquet.write_table(pyarrow.table([column] * len(names), [ascii(name) for name in names[:-1]] + ["text"]), written)
    return written.getvalue()


def tree(random_: random.Random, folder: Path, done: Path) -> Case:
    """A folder or glob with links, loops, FIFOs, odd names and files of all kinds among readable ones."""
    del done
    root = folder / "corpus"
    folders = [root, root / "in", root / "in" / "deep"]
    folders[-1].mkdir(parents=True)
    for number in range(random_.randrange(1, 12)):
        place = random_.choice(folders)
        match random_.randrange(7):
            case 0:
                target = random_.choice(
                    [root, place, folder, Path("nowhere"), Path(f"link{number}"), Path("/dev/zero")]
                )
                (place / f"link{number}{random_.choice(['', '.txt'])}").symlink_to(target)
            case 1:
                os.mkfifo(place / f"pipe{number}.txt")
            case 2:
                (place / f"{number}{random_.choice(OTHERS)}").write_bytes(random_.randbytes(random_.randrange(300)))
            case 3:
                name = os.fsdecode(random_.choice([b"\xff.txt", b"a\nb.txt", b".hidden", b"a b[1].txt", b"-x.txt"]))
                (place / name).write_text(PLAIN)
            case 4:
                (place / f"{number}.csv").write_text(f"id,text\n1,{PLAIN}\n2,{number}\n")
            case _:
                (place / f"{number}.txt").write_text(f"{number} {PLAIN}\n" * random_.randrange(1, 40))
    pattern = random_.choice(["", "", "**/*.txt", "**", "*", "**/*", "in/**/deep/*", "[", "**/**/**/*.txt", "in/../*"])
    field = random_.choice([[], [], [], ["data.text_field=text"], ["data.text_field=body"]])
    return Case("folders", pattern, ["prepare", "data=files", f"data.path={root / pattern}", *field, *SMALL])
