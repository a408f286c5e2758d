"""`moe import` and `moe export`: from which folder into which."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe.config.choices import ExportDtype, ExportFormat
from moe.config.rules import default_of, filled, positive, require


@dataclass(kw_only=True, slots=True)
class ImportConfig:
    """`checkpoint` is a Hugging Face model folder, `run_dir` a new folder. `tokenizer` is the folder or SentencePiece
    model to use in place of the tokenizer in `checkpoint`. `ignore_keys` are keys of config.json that are unknown here
    and known to change nothing.
    """

    checkpoint: str = ""
    run_dir: str = ""
    tokenizer: str | None = None
    ignore_keys: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(bool(self.checkpoint.strip()), "checkpoint='' must name a Hugging Face model folder")
        require(bool(self.run_dir.strip()), "run_dir='' must name a new folder")
        filled("", self, "tokenizer")


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """`checkpoint` is a run directory or one of its checkpoints, `path` a new folder.

    `format=gguf` writes a GGUF file into it, `format=huggingface` config.json, safetensors files and a tokenizer.
    `dtype=stored` keeps each weight's. `family` (mistral, mixtral, …; null: the first that can say what the model is)
    names the architecture to write. A safetensors file holds about `max_shard_gb` GB of tensors (null: 5). An adapter
    is merged into its base, or, with `format=peft`, written alone, as the package peft reads it.
    """

    checkpoint: str = ""
    path: str = ""
    format: ExportFormat = ExportFormat.huggingface
    family: str | None = None
    dtype: ExportDtype = ExportDtype.stored
    max_shard_gb: float | None = None

    def __post_init__(self) -> None:
        require(bool(self.checkpoint.strip()), "checkpoint='' must name a run directory or one of its checkpoints")
        require(bool(self.path.strip()), "path='' must name a new folder")
        filled("", self, "family")
        positive("", self, "max_shard_gb")
        unused = {ExportFormat.gguf: ("max_shard_gb",), ExportFormat.peft: ("max_shard_gb", "family", "dtype")}
        for name in unused.get(self.format, ()):
            value = getattr(self, name)
            require(
                value == default_of(self, name),
                f"{name}={getattr(value, 'name', value)} has no effect with format={self.format.name}: leave it out",
            )
