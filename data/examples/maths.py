"""Chat on worked maths problems: the rows of launch/examples/maths_chat.sh, and its page.

python -m data.examples.maths rows gsm8k_train.jsonl FOLDER   # rows.jsonl; held_out.jsonl and held_out.txt: some of
                                                              # the rows that `moe train data.held_out=0.1` holds out
python -m data.examples.maths page FOLDER PAGE                # the page, from the answers in FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from data.examples.cost import time_bars
from data.examples.page import Bar, Page, Table, elapsed, script_of
from data.examples.score import scored, write_prompts
from data.examples.splits import Row, asked, write_rows
from data.examples.training import active_parameters, final_metrics
from moe.config import DataConfig, RecordKind
from moe.data.records import DataRecord
from moe.data.sources import open_sources
from moe.data.survey import hash_of, survey_of, survey_part, wanted_threshold

HELD_OUT = 0.1  # data.held_out of the script
SHOWN = 4  # answers on the page


def once(lines: list[str]) -> list[str]:
    """The JSONL lines without those whose first user turn asks what an earlier one asks."""
    seen: dict[str, str] = {}
    for line in lines:
        seen.setdefault(asked({"prompt": turn(json.loads(line)["messages"], "user")}), line)
    return list(seen.values())


def turn(messages: list[dict[str, Any]], role: str) -> str:
    """The first content of a role."""
    return next(str(one["content"]) for one in messages if one["role"] == role)


def held_out(path: Path, share: float) -> list[Row]:
    """The rows that `data.held_out=share` keeps from training, as prompt and completion (first question and answer)."""
    (source,) = open_sources(DataConfig(path=str(path), records=RecordKind.messages))
    parts = (survey_part(part, wanted_threshold(share)) for part in source.parts())
    threshold = survey_of(source, share, parts).threshold
    kept = [one for one in source.chunks() if isinstance(one, DataRecord) and hash_of(one) < threshold]
    return [{"prompt": turn(one.messages, "user"), "completion": turn(one.messages, "assistant")} for one in kept]


def write(source: Path, folder: Path) -> None:
    lines = [line for line in source.read_text(encoding="utf-8").split("\n") if line.strip()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in once(lines)), encoding="utf-8")
    shown = [row for row in held_out(folder / "rows.jsonl", HELD_OUT) if len(row["prompt"].splitlines()) == 1][:SHOWN]
    write_rows(folder / "held_out.jsonl", shown)
    write_prompts(folder / "held_out.txt", shown)


def page(folder: Path) -> Page:
    base, chat = (final_metrics(folder / "runs" / name) for name in ("base_on_rows", "chat"))
    trained = final_metrics(folder / "runs/base")
    better = chat["val_loss"] < base["val_loss"]
    evaluations = [
        json.loads(line) for line in (folder / "runs/chat/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    evaluations = [one for one in evaluations if one.get("val_loss") is not None]
    lines = (folder / "validate.txt").read_text(encoding="utf-8").strip().splitlines()
    validated = "\n".join(line.rstrip().replace(str(folder), "FOLDER") for line in lines)
    return Page(
        title="Chat on worked maths problems",
        shows=f"""
A sparse model of {active_parameters(folder / "runs/base") / 1e6:.1f} M active parameters is pre-trained on text that
comes with Python ({trained["tokens"] / 1e6:.1f} M tokens), then fine-tuned with a chat template on GSM8K's worked
problems. Rows are packed; the loss is on the assistant's turns. The hash of a row decides which are held out
({HELD_OUT:.0%}); of rows with the same question only the first is kept, so no question is on both sides. The base's
loss is measured on the same held-out rows with the same template and mask, by one step with a learning rate of 1e-12.
""",
        script=script_of("maths_chat"),
        bars=[
            Bar(
                "held-out loss, nats a target",
                f"below the base's {base['val_loss']:.3f}",
                f"{chat['val_loss']:.3f}",
                better,
            ),
            *time_bars(folder, 10),
        ],
        tables=[
            Table(
                "Held-out loss while fine-tuning",
                ("step", "tokens", "held-out loss", "bits per byte"),
                [
                    (0, 0, f"{base['val_loss']:.3f}", f"{base['val_bits_per_byte']:.3f}"),
                    *(
                        (one["step"], f"{one['tokens']:,}", f"{one['val_loss']:.3f}", f"{one['val_bits_per_byte']:.3f}")
                        for one in evaluations
                    ),
                ],
            )
        ],
        samples=scored(folder / "held_out.jsonl", folder / "runs/chat/held_out.jsonl").samples,
        notes=f"""
A model of this size, after minutes, has the form of a worked solution and not its arithmetic. Rows are from GSM8K
(OpenAI, MIT).

## Template, mask and packing

What `moe validate …` prints: between `[[` and `]]` is what is learnt; prompts, and what the template puts around them,
are not. Sequences hold several rows, each of which sees itself only.

```text
{validated}
```
""",
        seconds=elapsed(folder),
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["rows", source, folder]:
            write(Path(source), Path(folder))
        case ["page", folder, path]:
            page(Path(folder)).write(Path(path))
        case _:
            sys.exit(__doc__)
