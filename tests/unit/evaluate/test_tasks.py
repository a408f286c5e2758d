"""Tasks by name, file and folder; what a task's files may not do; one line for each mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe.config import EvaluateConfig
from moe.errors import UserError

pytest.importorskip("lm_eval")
import huggingface_hub.constants
import lm_eval.utils

from moe.evaluate.guards import guarded
from moe.evaluate.tasks import load_tasks


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{one} + 1", "answer": str(one + 1)} for one in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own").mkdir()
    write("sums")
    return tmp_path


def write(name: str, text: str = "", **changes: Any) -> None:
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}, "cache_dir": "cache"},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["x"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    Path(f"own/{name}.yaml").write_text(yaml.safe_dump(task | changes) + text)


def loaded(tasks: str, trust: bool = False, include_path: str | None = "own", **settings: Any) -> dict[str, Any]:
    config = EvaluateConfig(checkpoint="run", tasks=tasks, include_path=include_path, trust_task_code=trust, **settings)
    with guarded(trust):
        return load_tasks(config)["tasks"]


def test_by_name_file_and_folder(desk: Path) -> None:
    write("more", num_fewshot=0)
    assert list(loaded("sums,more", num_fewshot=2)) == ["sums", "more"]
    assert [one.get_config("num_fewshot") for one in loaded("sums,more", num_fewshot=2).values()] == [2, 0]
    assert loaded("sums")["sums"].get_config("num_fewshot") == 0
    assert list(loaded("sums", include_path="own/sums.yaml")) == ["sums"]
    assert list(loaded("own/sums.yaml", include_path=None)) == ["sums"]


def test_code_runs_only_where_it_is_trusted(desk: Path) -> None:
    write("code", "process_docs: !function helper.changed\n")
    Path("own/helper.py").write_text("open('ran', 'w').close()\ndef changed(docs): return docs\n")
    with pytest.raises(UserError, match=r"own: a task names Python code there, !function helper.changed; trust_task"):
        loaded("code")
    with pytest.raises(UserError, match="own: a task names Python code there"):
        loaded("own/code.yaml", include_path=None)
    Path("own/all.yaml").write_text("group: all\ntask: [sums, code]\n")
    with pytest.raises(UserError, match="own: a task names Python code there"):
        loaded("all")
    assert not Path("ran").exists()
    assert list(loaded("code", trust=True)) == ["code"]
    assert Path("ran").exists()
    with pytest.raises(UserError, match="Python code"):
        loaded("code")  # trust ends with the command


def test_templates_run_in_a_sandbox(desk: Path) -> None:
    write("escape", doc_to_text="{{ question.__class__.__mro__ }}")
    before = lm_eval.utils.env
    with pytest.raises(UserError, match="SecurityError"):
        loaded("escape")
    assert lm_eval.utils.env is before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_path": "pandas"}, "dataset_path=pandas: must be json, csv, parquet, arrow or text"),
        ({"dataset_path": None}, "dataset_path is missing"),
        ({"dataset_kwargs": {"data_files": "none.jsonl"}}, "data_files=none.jsonl: no such file; a task's paths are"),
        ({"metric_list": [{"metric": "made_up"}]}, "metric made_up: would be Python code from the Hugging Face Hub"),
        ({"test_split": "validation"}, "KeyError: 'validation' (a split, column or key that isn't there)"),
        ({"doc_to_text": "{{ nothing }}"}, "'nothing' is undefined"),
        ({"output_type": "images"}, "Got invalid output_type 'images'"),
        ({"unsafe_code": True}, "task bad: runs code that the model writes; confirm_run_unsafe_code=true does"),
    ],
)
def test_tasks_that_can_not_be_used(desk: Path, changes: dict[str, Any], message: str) -> None:
    write("bad", **changes)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        loaded("bad")
    assert "\n" not in str(raised.value)


def test_a_data_set_of_the_hub_without_a_network(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    write("far", dataset_path="some/thing", dataset_kwargs={"cache_dir": "cache"})
    with pytest.raises(UserError, match="dataset_path=some/thing: not read from the Hugging Face Hub"):
        loaded("far")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


def test_names_that_are_not_there(desk: Path) -> None:
    write("capitals")
    with pytest.raises(UserError, match=r"no task capitels; did you mean capitals\? own has capitals, sums"):
        loaded("capitels")
    Path("own/torn.yaml").write_text("task: torn\n  x: [\n")
    with pytest.raises(UserError, match=r"own/torn.yaml:2: not valid YAML"):
        loaded("torn", include_path="own/torn.yaml")
    with pytest.raises(UserError, match="nowhere: no such folder or file"):
        loaded("sums", include_path="nowhere")
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        loaded("none.yaml")
