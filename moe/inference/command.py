"""`moe generate`: text after a prompt, or after every line of a file.

moe generate checkpoint=runs/tiny-stdlib prompt='def '
moe generate checkpoint=runs/tiny-stdlib prompts_file=prompts.txt temperature=0     # one JSON object a line
moe generate checkpoint=runs/chat prompt='How much is 2 + 2?' chat=true
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from moe.config.generate import GenerateConfig
from moe.config.rules import require
from moe.data.tokenizer_base import Tokenizer
from moe.errors import UserError
from moe.inference.chat import Asking, conversation
from moe.inference.generate import TextPiece, stream
from moe.model.transformer import Transformer


def read_prompts(path: Path) -> list[str]:
    """The lines of a UTF-8 file that aren't blank. Raises UserError naming the file (and the byte)."""
    try:
        lines = path.read_bytes().decode("utf-8").splitlines()
    except OSError as error:
        raise UserError(f"prompts_file={path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompts_file={path}: byte {error.start} isn't UTF-8; save the file as UTF-8") from error
    prompts = [line for line in lines if line.strip()]
    require(bool(prompts), f"prompts_file={path}: has no prompt; write one a line")
    return prompts


def run_generate(config: GenerateConfig, model: Transformer, tokenizer: Tokenizer, out: TextIO | None = None) -> None:
    """`moe generate`: one prompt's text is streamed; a file's prompts give one JSON object a line, in the file's order.

    Writes to `out`, or to standard output. With `chat=true` prompts are messages, and only the answers are written.
    """
    sink: TextIO = sys.stdout if out is None else out
    if config.chat:
        asked = Asking.of(model, tokenizer, config.template, config)

        def continued(prompts: list[str]) -> Iterator[TextPiece]:
            return asked.answers([conversation(config.system, prompt) for prompt in prompts])
    else:

        def continued(prompts: list[str]) -> Iterator[TextPiece]:
            return stream(model, tokenizer, prompts, config)

    if config.prompt is not None:
        waiting = "" if config.chat else config.prompt  # until the first piece: a prompt may be refused
        for piece in continued([config.prompt]):
            sink.write(waiting + piece.text)
            sink.flush()
            waiting = ""
        sink.write(waiting + "\n")
        return
    assert config.prompts_file is not None
    prompts = read_prompts(Path(config.prompts_file))
    for start in range(0, len(prompts), config.batch_size):
        batch = prompts[start : start + config.batch_size]
        texts = [""] * len(batch)
        for piece in continued(batch):
            texts[piece.prompt] += piece.text
        for prompt, text in zip(batch, texts, strict=True):
            sink.write(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
        sink.flush()
