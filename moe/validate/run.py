"""`moe validate`: reads every row, shows what it found, writes the page and the corrected copy."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from rich.console import Console

from moe.config import TokenizerKind
from moe.config.validate import ValidateConfig
from moe.data.find import expanded
from moe.data.readers import DataError
from moe.data.record_encoding import Recipe
from moe.data.sources import Source, open_tables
from moe.data.tokenizer import open_tokenizer
from moe.data.tokenizer_base import Tokenizer
from moe.data.tokenizer_training import SAMPLE_BLOCK, sample_blocks, train_sentencepiece
from moe.durable import write_durably
from moe.errors import UserError
from moe.plan.run import make_plan
from moe.validate.findings import Findings, Validation, examine, good_rows
from moe.validate.page import page
from moe.validate.terminal import show

WIDTH = 110  # columns where the output is not a terminal


def run_validate(config: ValidateConfig, console: Console | None = None) -> None:
    """Raises UserError, whose line is the last one, where a row is bad or nothing is left to train on."""
    if console is None:
        console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=WIDTH)
    validation = validate(config)
    show(validation, console)
    if config.page is not None:
        target = expanded("page", config.page)
        try:
            write_durably(target, page(validation))
        except OSError as error:
            raise UserError(f"page={config.page}: can't be written: {error.strerror}") from error
        console.print(f"the page: {target}", soft_wrap=True)
    sys.stdout.flush()  # the line about bad rows goes to stderr, after the tables
    if problems := len(validation.problems):
        fix = f"{config.fixed} has the others" if config.fixed else "fixed=rows.jsonl writes a copy without them"
        raise UserError(f"{problems:,} of {validation.rows:,} rows are bad: {fix}")
    for found in validation.findings:
        if found.good == found.duplicates()[0] + 1:
            raise UserError(
                f"source {found.name!r} ({found.description}) holds one distinct row: training and held-out rows need "
                "at least one each; give more rows"
            )


def validate(config: ValidateConfig) -> Validation:
    """Reads every row; writes `fixed`. Raises UserError where nothing can be read."""
    started = time.monotonic()
    sources = open_tables(config.data)
    recipe = Recipe.of(config.data, _tokenizer(config, sources), config.train.sequence_length)
    with _fixed(config.fixed) as keep:
        findings = [examine(source, recipe, config.data.held_out, config.samples, keep) for source in sources]
    empty = next((found for found in findings if not found.rows), None)
    if empty is not None:
        raise DataError(f"source {empty.name!r} ({empty.description}) is empty: it holds no row")
    return Validation(config, recipe, findings, make_plan(config), time.monotonic() - started)


def _tokenizer(config: ValidateConfig, sources: list[Source]) -> Tokenizer:
    if config.tokenizer.kind is not TokenizerKind.sentencepiece:
        return open_tokenizer(config.tokenizer)
    assert config.tokenizer.vocab_size is not None
    blocks = list(islice(sample_blocks(_texts(sources), 1.0), max(1, config.tokenizer.train_bytes // SAMPLE_BLOCK)))
    return train_sentencepiece(blocks, config.tokenizer.vocab_size, lambda line: print(line, file=sys.stderr))


def _texts(sources: list[Source]) -> Iterator[str]:
    """The texts of good rows, to train a tokenizer on."""
    for source in sources:
        yield from (record.text for _, record in good_rows(source, Findings(source.name, source.description)))


@contextmanager
def _fixed(name: str | None) -> Iterator[Callable[[str], Any] | None]:
    """A function that writes a line into the new file `name`, which is there when the block ends well."""
    if name is None:
        yield None
        return
    target = expanded("fixed", name)
    if target.exists():
        raise UserError(f"fixed={name}: exists already: name a file that doesn't")
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with partial.open("x", encoding="utf-8") as file:
            yield lambda line: file.write(f"{line}\n")
        partial.replace(target)
    except OSError as error:
        raise UserError(f"fixed={name}: can't be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
