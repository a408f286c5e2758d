"""`moe prepare`: the data and tokenizer of a training run, and whether shards that are there are checked again."""

from __future__ import annotations

from dataclasses import dataclass

from moe.config.run import Config


@dataclass(kw_only=True, slots=True)
class PrepareConfig(Config):
    """Every key of `moe train`; with `verify` the content of all shards is checked, also if it was before."""

    verify: bool = False
