"""Training data and tokenizer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe.config.choices import SourceFormat, TokenizerKind
from moe.config.rules import filled, positive, require
from moe.config.suggest import no_such_key
from moe.errors import UserError

MAX_TRAIN_BYTES = 10**12


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One corpus: a file, folder, glob, data set name, or a built-in domain (`format=stdlib`).

    `text_field` is the text column of JSONL, CSV, TSV, Parquet and data sets; `subset` and `split` are those of
    `datasets.load_dataset`; `weight` is the share of training samples (null: in proportion to tokens; all sources or
    none state one).
    """

    path: str = ""
    format: SourceFormat = SourceFormat.auto
    text_field: str = "text"
    weight: float | None = None
    subset: str | None = None
    split: str = "train"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Corpora. `data.path` is short for one source named `text`; a mixture names its sources in `data.sources`."""

    path: str | None = None
    format: SourceFormat = SourceFormat.auto
    text_field: str = "text"
    sources: dict[str, Any] = field(
        default_factory=dict
    )  # name → SourceConfig; Any, so that `+data.sources.x.path=` works
    held_out: float = 0.05
    cache_dir: str = "~/.cache/moe"

    def __post_init__(self) -> None:
        filled("data", self, "path", "text_field", "cache_dir")
        require(0 < self.held_out < 1, f"data.held_out={self.held_out} must be between 0 and 1: a share of documents")
        both = self.path is not None and self.sources
        require(not both, f"data.path={self.path} and data.sources can't both be set (data=files has no sources)")
        for name, default in (("text_field", "text"), ("format", SourceFormat.auto)):
            require(
                not self.sources or getattr(self, name) == default,
                f"data.{name} belongs to data.path: set data.path, or data.sources.NAME.{name} of a source",
            )
        self.sources = {name: _source(name, value) for name, value in self.sources.items()}
        weights = [source.weight for source in self.sources.values()]
        for name, source in self.sources.items():
            positive(f"data.sources.{name}", source, "weight")
            filled(f"data.sources.{name}", source, "path", "text_field", "subset", "split")
        stated = [weight for weight in weights if weight is not None]
        require(
            len(stated) in (0, len(weights)),
            f"data.sources weights={weights} must be stated for every source or for none",
        )

    def all_sources(self) -> dict[str, SourceConfig]:
        """Every source by name, `data.path` included."""
        if self.path is not None:
            return {"text": SourceConfig(path=self.path, format=self.format, text_field=self.text_field)}
        return dict(self.sources)


def path_name(path: str) -> str:
    """A short name for `data.path`: its last two parts, without wildcards and the file's suffix. May be empty.

    `books/*.txt` → `books`, `shakespeare/input.txt` → `shakespeare-input`, `owner/name` → `owner-name`.
    """
    parts = list(PurePosixPath(path).parts)
    if parts:
        parts[-1] = PurePosixPath(parts[-1]).stem
    words = [re.sub(r"[^\w.-]+", "-", part).strip("-.") for part in parts if not re.search(r"[*?[]", part)]
    return "-".join([word for word in words if word][-2:])


def _source(name: str, value: Any) -> SourceConfig:
    """A source as written in YAML, typed. Raises UserError naming the key."""
    if isinstance(value, SourceConfig):
        return value
    require(isinstance(value, dict), f"data.sources.{name}={value} must be a mapping with a path")
    known = [f"data.sources.{name}.{one.name}" for one in fields(SourceConfig)]
    for key in (f"data.sources.{name}.{one}" for one in value):
        require(key in known, no_such_key(key, [], known))
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SourceConfig), value))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        rule = str(error).splitlines()[0]
        raise UserError(f"data.sources.{name}={value}: {rule}") from error


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """`vocab_size` (pieces to train) and `train_bytes` (text sampled for it) belong to `kind=sentencepiece`; `path` to
    the kinds that read a file or folder; `kind=mistral` needs neither (mistral-common carries its own)."""

    kind: TokenizerKind = TokenizerKind.mistral  # the one kind that needs no other key
    path: str | None = None
    vocab_size: int | None = None
    train_bytes: int = 2_000_000

    def __post_init__(self) -> None:
        trains, kind = self.kind is TokenizerKind.sentencepiece, self.kind.value
        reads = self.kind in (TokenizerKind.model_file, TokenizerKind.huggingface)
        positive("tokenizer", self, "vocab_size")
        positive("tokenizer", self, "train_bytes", at_most=MAX_TRAIN_BYTES)
        filled("tokenizer", self, "path")
        require(not reads or bool(self.path), f"tokenizer.path={self.path} must name a file for tokenizer.kind={kind}")
        require(
            reads or self.path is None,
            f"tokenizer.path={self.path} must be null for tokenizer.kind={kind}: it reads no file",
        )
        require(
            trains == (self.vocab_size is not None),
            f"tokenizer.vocab_size={self.vocab_size} must be "
            + ("set for tokenizer.kind=sentencepiece" if trains else f"null for tokenizer.kind={kind}: it has its own"),
        )
        require(
            self.vocab_size is None or self.vocab_size >= 300,
            f"tokenizer.vocab_size={self.vocab_size} must be ≥ 300: 256 bytes, 4 special pieces and some characters "
            "(unless it is set, it is model.vocab_size)",
        )
