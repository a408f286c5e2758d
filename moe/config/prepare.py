"""`moe prepare`: the data and tokenizer of a training run, and whether to verify existing shards again."""

from __future__ import annotations

from dataclasses import dataclass

from moe.config.run import Config


@dataclass(kw_only=True, slots=True)
class PrepareConfig(Config):
    """Every key of `moe train`; `verify=true` checks the contents of all shards, also of those verified before."""

    verify: bool = False
