"""Every command in the documents works: it is run here with one small step, or composed where it needs a cluster.

A new command in a document is found by `documented.commands` and needs no change here. Data that a command names is
made in a temporary folder, and so is a run that it reads, by the documented command that trains it.
"""

from __future__ import annotations

import csv
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from moe.bench import (
    BENCHMARKS,
    attention,
    exchange,
    kernels,
    peers,
    prepare,
    roofline,
    scale,
    settings,
    startup,
    step,
    threads,
    time_to_loss,
)
from moe.bench import all as bench_all
from moe.cli.verbs import MULTIRUN, load
from moe.config import PrepareConfig
from moe.config.compose import load_config
from moe.config.multirun import expand
from tests import forkserver
from tests.e2e.conftest import environment
from tests.e2e.documented import DOCUMENTS, ROOT, Command, commands
from tests.faults.forked import Finished, moe_ranks

COMMANDS = commands()
EXCEPTIONS = {  # beginning of a command that isn't one of `moe` → why it isn't run here
    "bash launch/quickstart.sh": "installs and trains for minutes; the commands in it are tested here",
    "bash launch/test.sh": "runs all tests, this one too",
    "bash launch/examples/": "trains for minutes; tests/e2e/test_examples.py runs one",
    "bash launch/gpu_report.sh": "tests/unit/bench/test_gpu.py runs it with --dry-run",
    "bash launch/gpu_wheels.sh": "downloads packages",
    "bash launch/install_megablocks.sh": "compiles for a GPU; tests/unit/test_launch.py has its edit and its refusals",
    "python -m moe.bench.gpu.page": "needs a GPU's report; tests/unit/bench/test_gpu.py writes the page of a made one",
    "python -m pytest": "runs tests",
    "python -m tests.": "runs tests",
    "pip install": "downloads packages",
    "sky ": "rents machines; tests/unit/test_launch.py renders launch/skypilot.yaml",
    "kubectl ": "needs a cluster; tests/unit/test_launch.py renders launch/pytorchjob.yaml",
}
REFUSED = {  # documented as what names the keys, and as a plan that doesn't fit
    "moe plan hardware=custom": "must be stated: hardware.gpus_per_node=",
    "moe plan model=mixtral_8x7b parallel.expert_parallel_size=8 hardware=h100 hardware.nodes=2 "
    "train.precision=bfloat16 train.sequence_length=4096 train.micro_batch_size=1 train.global_batch_size=256": (
        "does not fit: needs "
    ),
}
SHORT = [
    "train.steps=1", "train.micro_batch_size=1", "train.global_batch_size=2", "train.eval_sequences=3",
    "train.sample_tokens=2", "train.peak_tflops=0.1", "tracking.backend=none",
]  # fmt: skip
SWEEP: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 200}  # its trials are forked too
PLAIN_RUN = "runs/tiny-stdlib"  # of `moe train`; what RUN and RUN_DIR stand for
EXPORTED = "exported"  # a Hugging Face folder, of `moe export`; what HF_DIR stands for


class Desk:
    """A folder in which commands are run as a reader would, each once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._done = folder, dict[Command, list[Finished]]()
        for name in ("data", "launch"):
            (folder / name).symlink_to(ROOT / name)

    def run(self, command: Command) -> list[Finished]:
        """Results by rank. Must be called in the folder."""
        assert command.arguments is not None
        if command not in self._done:
            verb, *rest = (_named(word) for word in command.arguments)
            self._prepare(verb, rest)
            if verb == "sweep":
                rest += ["sweep.trials=1", "train.steps=2"]
            if verb in ("train", "sweep", "prepare") and "--cfg" not in rest and "--help" not in rest:
                short = [*SHORT, *(["train.steps=8"] if "profile=true" in rest else [])]  # it profiles steps 5 to 8
                rest += [f"data.cache_dir={self._folder / 'cache'}", *(short if verb != "prepare" else [])]
                if (
                    rest
                    and verb in ("train", "sweep")
                    and not _value(rest, "run_dir")
                    and command.arguments != ("train",)
                ):
                    rest.append(f"run_dir=runs/{len(self._done)}")
            if verb == "analyze":
                rest += [f"data.cache_dir={self._folder / 'cache'}", "analyze.sequences=6", "analyze.permutations=5"]
            if verb == "sweep":
                done = forkserver.run([sys.executable, "-m", "moe", verb, *rest], **SWEEP, env=environment())
                self._done[command] = [Finished(done.returncode, done.stdout, done.stderr)]
            else:
                self._done[command] = moe_ranks(verb, *rest, ranks=command.ranks or 1, timeout=200)
        return self._done[command]

    def _prepare(self, verb: str, words: list[str]) -> None:
        if folder := _value(words, "include_path"):
            self._write_task(Path(folder))
        if path := _value(words, "data.path"):
            self._write(path, _value(words, "data.text_field") or "text")
        for path in (_value(words, "checkpoint"), _value(words, "init_from"), *words[: verb == "report"]):
            if path and not Path(path).exists():
                self.run(next(one for one in COMMANDS if _makes(one) == path))

    def _write_task(self, folder: Path) -> None:
        """The task that docs/evaluation.md shows, with rows."""
        shown = re.search(r"(?s)```yaml\n(.*?)```", (ROOT / "docs/evaluation.md").read_text(encoding="utf-8"))
        assert shown is not None
        folder.mkdir(exist_ok=True)
        (folder / "sums.yaml").write_text(shown[1])
        rows = [{"question": f"{one} + 3 =", "answer": str(one + 3)} for one in range(3)]
        (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def _write(self, path: str, field: str) -> None:
        """Text in the format that the path says, unless it is there."""
        place = Path(path.replace("**", "part").replace("*", "one"))
        if place.exists():
            return
        texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
        rows = [{field: part} for text in texts for part in re.split(r"\n(?=#)", text)]
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.name == "questions.jsonl":
            rows = [{"prompt": f"{one} + 3 =", "completion": str(one + 3)} for one in range(200)]
        if place.suffix == ".jsonl":
            place.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif place.suffix == ".csv":
            with place.open("w", newline="") as file:
                csv.writer(file).writerows([["id", field], *([index, row[field]] for index, row in enumerate(rows))])
        elif place.suffix == ".parquet":
            Dataset.from_list(rows).to_parquet(place)
        elif "dataset" in place.name:
            Dataset.from_list(rows).save_to_disk(place)
        elif place.suffix:
            place.write_text("\n".join(texts))
        else:
            place.mkdir()
            for index, text in enumerate(texts):
                (place / f"{index}.txt").write_text(text)


def _value(words: list[str], key: str) -> str:
    return next((word.removeprefix(f"{key}=") for word in words if word.startswith(f"{key}=")), "")


def _named(word: str) -> str:
    """A word of a command with folders of the desk in place of those that it leaves open."""
    word = re.sub(r"(^|=)(RUN|RUN_DIR)$", rf"\1{PLAIN_RUN}", word)
    return re.sub(r"=HF_DIR$", f"={EXPORTED}", word)


def _makes(command: Command) -> str:
    """The folder that a command writes and another one reads."""
    words = list(command.arguments or ())
    if words[:1] == ["export"]:
        return _value(words, "path")
    return _value(words, "run_dir") if words[:1] in (["import"], ["upcycle"]) else _run_dir(command)


def _run_dir(command: Command) -> str:
    if command.arguments is None or command.arguments[0] not in ("train", "sweep"):
        return ""
    return PLAIN_RUN if command.arguments == ("train",) else _value(list(command.arguments), "run_dir")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"))


@pytest.fixture(autouse=True)
def _at_the_desk(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk._folder)


def _runs_here(command: Command) -> bool:
    assert command.arguments is not None
    large = any(re.match(r"model=mi[sx]tral", word) for word in command.arguments)
    return not command.sketch and command.ranks in (1, 2) and not (large and command.arguments[0] == "train")


def _is_long(command: Command) -> bool:
    """Starts several processes, or measures the machine."""
    assert command.arguments is not None
    several = any(word in MULTIRUN for word in command.arguments)
    return several or command.arguments[0] in ("sweep", "analyze", "doctor", "bench")


@pytest.mark.parametrize(
    "command",
    [pytest.param(one, marks=[pytest.mark.slow] * _is_long(one)) for one in COMMANDS if one.arguments],
    ids=str,
)
def test_a_documented_command_works(command: Command, desk: Desk) -> None:
    assert command.arguments is not None
    verb, *rest = command.arguments
    if verb == "bench":
        _check_bench(rest)  # it measures for minutes
        return
    if verb in ("train", "prepare") and "--cfg" not in rest and "--help" not in rest:
        if _value(rest, "init_from"):
            desk._prepare(verb, rest)
        jobs = expand([word for word in rest if word not in MULTIRUN]) if verb == "train" else [rest]
        config = [load(job, verb) for job in jobs][-1]
        if not command.sketch and verb == "train":
            config.check_world(command.ranks)
    message = REFUSED.get(command.text)
    if verb == "plan" and message is None:  # it would round a batch up that `moe train` refuses
        planned = load(rest, "plan")
        planned.check_world(planned.hardware.world_size, planned.hardware.gpus_per_node)
    if _runs_here(command):
        for done in desk.run(command):
            assert done.code == (2 if message else 0), done.out + done.err
            assert (message or "") in done.err
        if run_dir := _run_dir(command):
            found = desk._folder / run_dir / ("trials.csv" if verb == "sweep" else "metrics.jsonl")
            assert found.exists() or (desk._folder / run_dir / "0/metrics.jsonl").exists()
    else:
        assert verb == "train" or command.sketch, "only training needs a cluster"


PARSED: dict[str, Callable[[list[str]], Any]] = {  # benchmarks with keys of their own
    "roofline": roofline.parse,
    "kernels": kernels.parse,
    "scale": scale.parse,
    "step": step.parse,
    "exchange": exchange.parse,
    "threads": threads.parse,
    "startup": startup.parse,
    "time_to_loss": time_to_loss.parse,
    "all": bench_all.parse,
}


def _check_bench(words: list[str]) -> None:
    if not words:
        return  # lists them
    name, *rest = words
    assert name in BENCHMARKS
    importlib.import_module(f"moe.bench.{name}")
    rest = [word for word in rest if not word.startswith(("json=", "plot="))]
    if name == "attention":
        attention._window(rest)
    elif name in ("peers", "memory_peers"):
        peers.parse(rest)
    elif name in PARSED:
        PARSED[name](rest)
    elif name == "prepare":
        load_config(prepare.split(rest)[1], "prepare", PrepareConfig)
    else:
        load_config(settings.split(rest)[1])


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.arguments is None], ids=str)
def test_any_other_command_is_an_exception_with_a_reason_and_names_files_that_exist(command: Command) -> None:
    plain = re.sub(r"^(\S+=\S* |sudo )*", "", command.text)
    assert any(plain.startswith(beginning) for beginning in EXCEPTIONS), f"{command}: run it, or say here why not"
    for word in plain.partition("#")[0].split():
        if re.match(r"(launch|tests|docs)/", word):
            assert (ROOT / word).exists(), word


def test_no_exception_is_left_over() -> None:
    plain = [re.sub(r"^(\S+=\S* |sudo )*", "", one.text) for one in COMMANDS if one.arguments is None]
    assert [one for one in EXCEPTIONS if not any(text.startswith(one) for text in plain)] == []


def test_commands_are_found_where_they_are() -> None:
    """So that the search can't fall silent: a command of each kind of place."""
    found = {(one.where.partition(":")[0], one.text.split()[0]) for one in COMMANDS}
    assert {("README.md", "moe"), ("docs/plan.md", "moe"), ("data/README.md", "moe")} <= found
    assert {("moe --help", "torchrun")} <= found
    assert {("launch/torchrun.sh", "bash"), ("launch/slurm.sbatch", "sbatch"), ("launch/quickstart.sh", "moe")} <= found
