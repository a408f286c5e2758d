"""`moe evaluate` on a run: its table, its file, and the same results from two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL
from tests.faults.forked import moe_ranks

TASKS = {
    "choose": "output_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: 0\n",
    "write": "output_type: generate_until\ndoc_to_target: '{{choices[0]}}'\n"
    "generation_kwargs: {until: [','], max_gen_toks: 8}\n",
    "texts": "output_type: loglikelihood_rolling\ndoc_to_target: '{{question}} {{choices[0]}}'\n",
}


@pytest.fixture(scope="module")
def run(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose experts were split over two ranks, with a folder of tasks beside it."""
    folder = tmp_path_factory.mktemp("evaluate")
    short = ["train.steps=2", "train.eval_every=2", "train.sample_every=100", "checkpoint.every=2"]
    run = f"run_dir={folder / 'run'}"
    done = moe_ranks("train", run, *corpus, *SMALL, *short, "parallel.expert_parallel_size=2", ranks=2)
    assert [one.code for one in done] == [0, 0], done[0].err
    (folder / "tasks").mkdir()
    rows = [{"question": f"{a} plus 2 makes", "choices": [str(a + 2), str(a), "none"]} for a in range(7)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, own in TASKS.items():
        shared = f"task: {name}\ndataset_path: json\ntest_split: test\ndoc_to_text: '{{{{question}}}}'\n"
        files = f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}, cache_dir: {folder / 'cache'}}}\n"
        (folder / "tasks" / f"{name}.yaml").write_text(shared + files + own)
    return folder / "run"


def _command(run: Path, *more: str) -> list[str]:
    return ["evaluate", f"checkpoint={run}", f"include_path={run.parent / 'tasks'}", *more]


def test_one_rank_and_two_give_the_same_results(run: Path) -> None:
    files = [run.parent / f"{ranks}.json" for ranks in (1, 2)]
    words = ["tasks=choose,write,texts", "log_samples=true", "batch_size=2"]
    done = [moe_ranks(*_command(run, *words, f"output={file}"), ranks=ranks) for ranks, file in enumerate(files, 1)]
    assert [[one.code for one in ranks] for ranks in done] == [[0], [0, 0]], done[-1][0].err
    assert "|word_perplexity|" in done[0][0].out
    assert done[1][1].out == ""
    alone, divided = (json.loads(file.read_text()) for file in files)
    assert alone["results"] == divided["results"]
    assert alone["samples"] == divided["samples"]
    assert alone["n-samples"]["choose"] == {"original": 7, "effective": 7}
    assert (alone["ranks"], divided["ranks"]) == (1, 2)
    assert alone["checkpoint"]["step"] == 2
    assert len(alone["checkpoint"]["fingerprint"]) == 64
    assert alone["config"]["tasks"] == "choose,write,texts"


def test_the_file_lies_in_the_run(run: Path) -> None:
    [done] = moe_ranks(*_command(run, "tasks=choose", "limit=3"))
    assert done.code == 0, done.err
    [file] = (run / "evaluation").glob("*.json")
    assert done.out.splitlines()[-1] == str(file)
    found = json.loads(file.read_text())
    assert found["n-samples"]["choose"]["effective"] == 3
    assert "samples" not in found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tasks=choose", "limit=0"], "limit=0.0 must be > 0"),
        (["tasks=choose", "limit=1.5"], "limit=1.5 must be a whole number of documents, or a share"),
        (["tasks="], "tasks='' must name a task"),
        (["tasks=choose", "checkpoint=nowhere"], "checkpoint=nowhere: no checkpoint there"),
        (["tasks=choose", "output=/"], "output=/: is a folder"),
        (["tasks=choose", "apply_chat_template=true"], "tokenizer has no chat template"),
    ],
)
def test_mistakes_are_one_line(run: Path, words: list[str], message: str) -> None:
    [done] = moe_ranks(*_command(run, *words))
    assert done.code == 2
    assert message in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
