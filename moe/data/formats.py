"""Which format a file has, by its name; and files that are no text, with what to do instead."""

from __future__ import annotations

import stat
from pathlib import Path

from moe.config import SourceFormat
from moe.data.readers import COMPRESSED_SUFFIXES

FORMATS = {
    ".jsonl": SourceFormat.jsonl,
    ".ndjson": SourceFormat.jsonl,
    ".json": SourceFormat.jsonl,
    ".csv": SourceFormat.csv,
    ".tsv": SourceFormat.tsv,
    ".parquet": SourceFormat.parquet,
}
NEVER_OPENED = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz", ".dill")
NOT_TEXT = {  # suffixes → what such a file is, and what to do
    ".html .htm .xhtml .mhtml": "HTML, whose tags would be trained on: extract its text first, or say KEY.format=text "
    "to train on the tags too",
    ".pdf .docx .doc .odt .rtf .epub .mobi .pptx .ppt .odp .ps .djvu .pages": "a document with a layout, not plain "
    "text: extract its text to a .txt file first",
    ".xlsx .xls .ods .numbers": "a spreadsheet: save it as .csv first",
    ".zip .tar .tgz .tbz .tbz2 .txz .tzst .7z .rar .jar .whl .cab .iso .deb .rpm": "an archive: unpack it and give the "
    "folder",
    ".lz4 .br .z .lzo .lzma .sz .snappy": "compressed in a way that is not read (.gz, .bz2, .xz and .zst are): "
    "decompress it first",
    ".arrow .feather .avro .orc .h5 .hdf5 .sqlite .sqlite3 .db .mdb .tfrecord .dta .rds .mat": "a table or database in "
    "a format that is not read: export it as .parquet, .jsonl or .csv",
    ".png .jpg .jpeg .gif .webp .bmp .tif .tiff .ico .heic .psd .mp3 .wav .flac .ogg .m4a .mp4 .mov .avi .mkv .webm": (
        "image, sound or video, not text: leave it out"
    ),
    ".exe .dll .so .dylib .o .a .pyc .class .wasm .safetensors .gguf .onnx .ttf .otf .woff .woff2": (
        "a binary file, not text: leave it out"
    ),
}
_REASONS = {suffix: reason for suffixes, reason in NOT_TEXT.items() for suffix in suffixes.split()}


def format_of(stated: SourceFormat, path: Path) -> SourceFormat:
    """How a file is read: as stated, or by its name without the ending of a compressed file."""
    return FORMATS.get(_suffix(path), SourceFormat.text) if stated is SourceFormat.auto else stated


def refusal(stated: SourceFormat, path: Path, key: str) -> str | None:
    """Why this file isn't read, and what to do; None where it is. A stated format reads all but pickles."""
    suffix = _suffix(path)
    if suffix in NEVER_OPENED:
        return f"{suffix} files may be pickles, which run code when read: never opened"
    if format_of(stated, path) is SourceFormat.parquet and path.suffix.lower() in COMPRESSED_SUFFIXES:
        return "a compressed Parquet file: decompress it first (Parquet compresses its columns itself)"
    if stated is SourceFormat.auto and (reason := _REASONS.get(suffix)):
        return reason.replace("KEY", key)
    return None


def _suffix(path: Path) -> str:
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED_SUFFIXES else path
    return inner.suffix.lower()


def short_name(path: Path) -> str:
    """A file's kind in a count of files: its ending."""
    return "".join(path.suffixes[-2:] if path.suffix.lower() in COMPRESSED_SUFFIXES else path.suffixes[-1:]).lower()


def special(path: Path) -> str | None:
    """What a path names that is neither a file nor a folder, such as a FIFO; None where there is nothing special."""
    mode = path.stat().st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    return "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
