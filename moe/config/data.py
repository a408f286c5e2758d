"""Training data and tokenizer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any

from moe.config.choices import LongRows, LossOn, Packing, RecordKind, SourceFormat, TemplateName, TokenizerKind
from moe.config.rules import filled, positive, require
from moe.config.suggest import no_such_key
from moe.errors import UserError

MAX_TRAIN_BYTES = 10**12
MOST_PROCESSES = 1024
MAX_TOKEN = 100  # characters of a special token
# Keys that a source has, and `data` too for the source that `data.path` names.
OF_A_SOURCE = ("format", "text_field", "prompt_field", "completion_field", "messages_field")
OF_RECORDS = ("prompt_field", "completion_field", "messages_field")


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One corpus: a file, folder, glob, data set name, or a built-in domain (`format=stdlib`).

    `text_field` is the text column of JSONL, CSV, TSV, Parquet and data sets; `subset` and `split` are those of
    `datasets.load_dataset`; `weight` is the share of training samples (null: in proportion to tokens; all sources or
    none state one). `records` is what its rows are (null: `data.records`); `prompt_field`, `completion_field` and
    `messages_field` are columns of the kinds that have them (`messages_field=null`: `messages`, or ShareGPT's
    `conversations`).
    """

    path: str = ""
    format: SourceFormat = SourceFormat.auto
    records: RecordKind | None = None
    text_field: str = "text"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    messages_field: str | None = None
    weight: float | None = None
    subset: str | None = None
    split: str = "train"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Corpora. `data.path` is short for one source named `text`; a mixture names its sources in `data.sources`.

    `records` is what rows are; where they are not documents, `template`, `loss_on` and `long_rows` say how a row
    becomes a sequence of tokens and targets (docs/fine-tuning.md). Documents become the sequences to train on by
    `packing`; their tokens see their own document only, or with `document_mask=false` those before it in the sequence
    too. Held-out documents are end to end and masked whatever these two say, so that their losses can be compared.
    `processes` prepare the token shards, which are the same for any number (null: one for each core, and fewer where
    there is little text).
    """

    path: str | None = None
    format: SourceFormat = SourceFormat.auto
    records: RecordKind = RecordKind.documents
    text_field: str = "text"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    messages_field: str | None = None
    template: TemplateName = TemplateName.auto
    loss_on: LossOn = LossOn.completion
    long_rows: LongRows = LongRows.truncate
    packing: Packing = Packing.concat
    document_mask: bool = True
    sources: dict[str, Any] = field(
        default_factory=dict
    )  # name → SourceConfig; Any, so that `+data.sources.x.path=` works
    held_out: float = 0.05
    cache_dir: str = "~/.cache/moe"
    processes: int | None = None

    def __post_init__(self) -> None:
        filled("data", self, "path", "cache_dir", *OF_A_SOURCE[1:])
        require(0 < self.held_out < 1, f"data.held_out={self.held_out} must be between 0 and 1: a share of documents")
        positive("data", self, "processes", at_most=MOST_PROCESSES)
        both = self.path is not None and self.sources
        require(not both, f"data.path={self.path} and data.sources can't both be set (data=files has no sources)")
        for name in OF_A_SOURCE:
            require(
                not self.sources or getattr(self, name) == getattr(SourceConfig(), name),
                f"data.{name} belongs to data.path: set data.path, or data.sources.NAME.{name} of a source",
            )
        self.sources = {name: _source(name, value) for name, value in self.sources.items()}
        weights = [source.weight for source in self.sources.values()]
        for name, source in self.sources.items():
            positive(f"data.sources.{name}", source, "weight")
            filled(f"data.sources.{name}", source, "path", "subset", "split", *OF_A_SOURCE[1:])
        stated = [weight for weight in weights if weight is not None]
        require(
            len(stated) in (0, len(weights)),
            f"data.sources weights={weights} must be stated for every source or for none",
        )
        self._check_records()

    def _check_records(self) -> None:
        """Raises UserError where a key of fine-tuning or of documents has nothing that reads it."""
        for key, source in ({"data": self} if self.path is not None else self.all_sources()).items():
            prefix = key if key == "data" else f"data.sources.{key}"
            kind = source.records or self.records
            for name in OF_RECORDS:
                stated, default = getattr(source, name), getattr(SourceConfig(), name)
                require(
                    kind is not RecordKind.documents or stated == default,
                    f"{prefix}.{name}={stated} is read for fine-tuning only: add data=sft, or {prefix}.records=auto",
                )
        for name, default in (
            ("template", TemplateName.auto), ("loss_on", LossOn.completion), ("long_rows", LongRows.truncate),
        ):  # fmt: skip
            value = getattr(self, name)
            require(
                self.has_records or value is default or not self.all_sources(),
                f"data.{name}={value.name} is read for fine-tuning only: add data=sft, or data.records=auto",
            )
        kinds = {source.records or self.records for source in self.all_sources().values()}
        require(
            self.packing is Packing.concat or not kinds or RecordKind.documents in kinds,
            f"data.packing={self.packing.name} is for documents only: leave it out, rows are packed whole anyway",
        )
        require(
            self.document_mask or not self.has_records,
            "data.document_mask=false is for documents only: leave it out, a row for fine-tuning sees no other row",
        )

    @property
    def has_records(self) -> bool:
        """Whether rows of any source are fine-tuning's."""
        kinds = [source.records for source in self.all_sources().values()]
        return any((kind or self.records) is not RecordKind.documents for kind in kinds)

    def all_sources(self) -> dict[str, SourceConfig]:
        """Every source by name, `data.path` included."""
        if self.path is not None:
            return {"text": SourceConfig(path=self.path, **{name: getattr(self, name) for name in OF_A_SOURCE})}
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
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

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
    the kinds that read a file or folder; `kind=mistral` needs neither (mistral-common carries its own).
    `add_special_tokens` get the ids behind the last one of an existing tokenizer (`moe.data.added_tokens`)."""

    kind: TokenizerKind = TokenizerKind.mistral  # the one kind that needs no other key
    path: str | None = None
    vocab_size: int | None = None
    train_bytes: int = 2_000_000
    add_special_tokens: list[str] = field(default_factory=list)

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
        self._check_added()

    def _check_added(self) -> None:
        key, tokens = "tokenizer.add_special_tokens", self.add_special_tokens
        require(
            not tokens or self.kind is not TokenizerKind.sentencepiece,
            f"{key}={tokens} extends an existing tokenizer, and tokenizer.kind=sentencepiece trains one: state "
            "another kind, or init_from",
        )
        for token in tokens:
            require(
                bool(token) and token.isprintable() and not any(map(str.isspace, token)),
                f"{key}={token!r} must have printable characters and no spaces, as in {key}=[<|im_start|>,<|im_end|>]",
            )
            require(len(token) <= MAX_TOKEN, f"{key}={token[:20]}… must have at most {MAX_TOKEN} characters")
            require(tokens.count(token) == 1, f"{key}={token} must be stated once")
