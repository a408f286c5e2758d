"""The chain import → upcycle → validate → train → evaluate → export → transformers: rows, comparison and page.

python -m data.examples.upcycle rows FOLDER      # train.jsonl, held_out.jsonl, asked.txt, tasks/parity.yaml
python -m data.examples.upcycle compare FOLDER   # comparison.json: the export in transformers, the run here
python -m data.examples.upcycle page FOLDER PAGE # the page, from what is in FOLDER
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import yaml

from data.examples.cost import time_bars
from data.examples.page import Bar, Page, Table, elapsed, script_of
from data.examples.score import scored, write_prompts
from data.examples.splits import Row, leaks, split, write_rows
from data.examples.training import active_parameters, final_metrics

ROWS, HELD_OUT = 2_000, 0.1
ASKED = 16  # held-out prompts that both programs answer
NEW_TOKENS = 16
SEEDS = (0, 1)


def rows(seed: int = 0) -> list[Row]:
    """Whether a number is even, for `ROWS` numbers of up to four digits."""
    numbers = random.Random(seed).sample(range(10_000), ROWS)
    return [
        {"prompt": f"Is {number} even or odd?", "completion": f"It is {('even', 'odd')[number % 2]}."}
        for number in numbers
    ]


def write(folder: Path) -> None:
    train, held_out = split(rows(), HELD_OUT)
    assert not leaks(train, held_out)
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "held_out.jsonl", held_out)
    write_rows(folder / "asked.jsonl", held_out[:ASKED])
    write_prompts(folder / "asked.txt", held_out[:ASKED])
    task = {
        "task": "parity",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((folder / "held_out.jsonl").resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{completion}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": NEW_TOKENS},
        "filter_list": [  # templates put a space before an answer
            {
                "name": "stripped",
                "filter": [{"function": "regex", "regex_pattern": r"\s*(.*)"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks" / "parity.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def compare(folder: Path) -> dict[str, Any]:
    """Greedy answers of the export in transformers, beside the answers of `moe generate`; whether our model's most
    probable token is theirs at every place; and the largest difference of a logit of the upcycled from the dense model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moe import api

    tokenizer = AutoTokenizer.from_pretrained(folder / "exported")
    theirs = AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=torch.float32).eval()
    ours = api.load(folder / "runs/lora", device="cpu")
    answers = scored(folder / "asked.jsonl", folder / "answers.jsonl").samples
    same_text = tokens = same_tokens = 0
    for sample in answers:
        chat = [{"role": "user", "content": sample.prompt}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made_1S = theirs.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        begin = prompt["input_ids"].shape[1]
        same_text += tokenizer.decode(made_1S[0, begin:], skip_special_tokens=True).strip() == sample.answer.strip()
        with torch.no_grad():
            logits_1SV = ours.model(made_1S[:, :-1]).logits_BSV
        assert logits_1SV is not None
        equal_T = logits_1SV[0, begin - 1 :].argmax(-1) == made_1S[0, begin:]
        tokens, same_tokens = tokens + len(equal_T), same_tokens + int(equal_T.sum())
    text = "def main():\n    return 3 + 4\n"
    dense, sparse = (api.load(folder / "runs" / name, device="cpu").logits(text) for name in ("imported", "upcycled"))
    return {
        "asked": len(answers),
        "same_text": same_text,
        "tokens": tokens,
        "same_tokens": same_tokens,
        "upcycled_difference": float((dense - sparse).abs().max() / dense.abs().max().clamp(min=1)),
    }


def page(folder: Path) -> Page:
    found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    results = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["results"]["parity"]
    exact = next(value for name, value in results.items() if name.startswith("exact_match,"))
    losses = {
        (kind, seed): _losses(folder / "runs" / f"from_{kind}_{seed}")
        for kind in ("upcycled", "scratch")
        for seed in SEEDS
    }
    dense = final_metrics(folder / "runs/dense")
    steps = sorted(losses["upcycled", SEEDS[0]])
    lower = all(losses["upcycled", seed][step] < losses["scratch", seed][step] for seed in SEEDS for step in steps)
    tokens = final_metrics(folder / "runs" / f"from_scratch_{SEEDS[0]}")["tokens"]
    return Page(
        title="Upcycle, fine-tune, export",
        shows=f"""
A dense model of {active_parameters(folder / "runs/dense") / 1e6:.1f} M parameters is trained for
{dense["tokens"] / 1e6:.1f} M tokens and exported: that folder stands for a published checkpoint. It is imported,
becomes a mixture of 8 experts, learns with LoRA from {ROWS:,} rows whether a number is even ({HELD_OUT:.0%} held out by
the hash of the prompt), is evaluated by lm-evaluation-harness, exported with the adapter merged, and answers in
`transformers`.
""",
        script=script_of("upcycle"),
        bars=[
            Bar(
                "upcycled and dense model compute the same",
                "≤ 1e-5 of max(1, largest logit)",
                f"{found['upcycled_difference']:.1e}",
                found["upcycled_difference"] <= 1e-5,
            ),
            Bar("held-out rows, exact match", "stated", f"{100 * exact:.1f} %", True),
            Bar(
                "answers in transformers equal to `moe generate`",
                "all",
                f"{found['same_text']} of {found['asked']}, {found['same_tokens']} of {found['tokens']} tokens",
                found["same_text"] == found["asked"] and found["same_tokens"] == found["tokens"],
            ),
            Bar(
                f"held-out loss after {tokens / 1e6:.1f} M further tokens",
                "upcycled below scratch, each seed",
                " / ".join(
                    f"{losses['upcycled', seed][steps[-1]]:.3f} < {losses['scratch', seed][steps[-1]]:.3f}"
                    for seed in SEEDS
                ),
                lower,
            ),
            *time_bars(folder, 10),
        ],
        tables=[
            Table(
                "Upcycled or from scratch: held-out loss at equal further tokens",
                ("steps", *(f"{kind}, seed {seed}" for seed in SEEDS for kind in ("upcycled", "scratch"))),
                [
                    (step, *(f"{losses[kind, seed][step]:.3f}" for seed in SEEDS for kind in ("upcycled", "scratch")))
                    for step in steps
                ],
                f"""
Same data, order, learning rate and shape; {tokens:,} tokens each. The dense model's {dense["tokens"]:,} tokens come on
top for the upcycled one: this is what a checkpoint that exists already saves. Its own held-out loss was
{dense["val_loss"]:.3f}.
""",
            )
        ],
        samples=scored(folder / "asked.jsonl", folder / "answers.jsonl").shown(4),
        seconds=elapsed(folder),
    )


def _losses(run: Path) -> dict[int, float]:
    """Held-out loss by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["val_loss"] for line in lines if line.get("val_loss") is not None}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["rows", folder]:
            write(Path(folder))
        case ["compare", folder]:
            path = Path(folder, "comparison.json")
            path.write_text(json.dumps(compare(Path(folder)), indent=1) + "\n", encoding="utf-8")
        case ["page", folder, path]:
            page(Path(folder)).write(Path(path))
        case _:
            sys.exit(__doc__)
