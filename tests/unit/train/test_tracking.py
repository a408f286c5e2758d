"""Every metric reaches metrics.jsonl and W&B's own file, the load-balancing loss first; W&B can't cost the run."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe.config.compose import load_config
from moe.train.tracking import Tracker
from tests.ranks import run_ranks

FIGURES = {
    "step": 1, "tokens": 64, "skipped_steps": 0, "time": 1.8e9, "elapsed": 6.4,
    "loss": 3.5, "lm_loss": 3.4, "load_balancing_loss": 1.25, "router_z_loss": 0.5,
    "grad_norm": 1.0, "lr": 0.1, "tokens_per_second": 10.0, "mfu": 0.1, "step_seconds": 6.4, "max_violation": 0.3,
    "router_entropy": 0.7, "dead_experts": 0, "dropped_fraction": 0.0, "expert_shares": [[0.25, 0.75], [0.5, 0.5]],
    "load_balancing_loss_layers": [1.5, 1.0], "val_loss": 3.0, "val_loss_by_source": {"prose": 2.5},
}  # fmt: skip


def _records(data: bytes) -> list[bytes]:
    """W&B's file is a LevelDB log behind a 7-byte header: blocks of 32 KiB, chunks of crc, length, type and payload."""
    records, part, at = [], b"", 7
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block that a chunk header doesn't fit in
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(part)
            part = b""
    return records


def _parsed(path: Path) -> list[Any]:
    from wandb.proto import wandb_internal_pb2

    parsed = []
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        parsed.append(record)
    return parsed


def history(path: Path) -> list[dict[str, Any]]:
    """Every logged step of a .wandb file, as W&B itself would upload it."""
    items = [record.history.item for record in _parsed(path) if record.HasField("history")]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in step} for step in items]


def logged(run_dir: Path) -> dict[str, Any]:
    """The newest values of the only offline run."""
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    values: dict[str, Any] = {}
    for step in history(path):
        values |= step
    return values


def test_wandb_gets_every_number_once_and_experts_as_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    warnings: list[str] = []
    tracker = Tracker(load_config(["tracking=wandb"]), tmp_path, resumed=False, warn=warnings.append)
    tracker.log(FIGURES)
    tracker.close()
    history = logged(tmp_path)
    assert history["balance/load_balancing_loss"] == 1.25
    assert [history[f"layers/load_balancing_loss_{layer:02d}"] for layer in (0, 1)] == [1.5, 1.0]
    assert (history["val/loss"], history["val/loss_by_source/prose"]) == (3.0, 2.5)
    assert (history["train/skipped_steps"], history["balance/dropped_fraction"]) == (0, 0.0)
    assert not {"val/val_loss", "train/dropped_fraction"} & history.keys()
    assert history["experts/expert_shares/_type"] == "histogram"
    assert history["experts/expert_shares_heatmap/_type"] == "html-file"
    sections = sorted({key.partition("/")[0] for key in history if "/" in key})
    assert sections == ["balance", "experts", "layers", "speed", "train", "val"], "W&B shows them in this order"
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == FIGURES
    assert len(warnings) == 1
    assert "wandb sync" in warnings[0]


def test_layers_and_experts_are_logged_every_n_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 experts of 4 layers: one histogram and one picture, not 256 numbers a step."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = load_config(["tracking=wandb", "tracking.detail_every=3", "train.steps=8"])
    tracker = Tracker(config, tmp_path, resumed=False, warn=[].append)
    for step in range(1, 9):
        tracker.log(FIGURES | {"step": step, "expert_shares": [[1 / 64] * 64] * 4, "new_diagnostic_layers": [0.5] * 4})
    tracker.close()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    steps = history(path)
    detailed = [step["_step"] for step in steps if "experts/expert_shares/_type" in step]
    assert detailed == [1, 3, 6, 8]
    assert [step["_step"] for step in steps if "layers/new_diagnostic_03" in step] == detailed
    assert max(len(step) for step in steps) < 40
    assert len(list(path.parent.glob("files/media/html/**/*.html"))) == 4


def test_wandb_gets_samples_routing_facts_tags_and_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    overrides = ["tracking=wandb", "tracking.group=sweep", "tracking.tags=[small,first]", "tracking.report=true"]
    overrides += ["model.sparse_layers=[1,3]"]
    facts = {"ranks": 2, "code": {"code.moe": "0123"}}
    tracker = Tracker(load_config(overrides), tmp_path, resumed=False, warn=[].append, facts=facts)
    tracker.log(FIGURES)
    tracker.sample({"step": 1, "prompt": "Once <upon", "text": " a time \ud800"})
    tracker.routing({"step": 1, "tokens": ["a", "b"], "experts": [[0, None], [1, 0]], "num_experts": 2})
    (tmp_path / "report.html").write_text("the report")
    tracker.report(tmp_path / "report.html")
    tracker.close()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    (step,) = history(path)
    assert {"samples/text/path", "samples/routing/path"} <= step.keys()
    pages = [page.read_text() for page in path.parent.glob("files/media/html/**/*.html")]
    assert any("<b>Once &lt;upon</b> a time ?" in page for page in pages)
    (routing,) = [page for page in pages if 'class="t c0 u0"' in page]
    assert 'value="0" checked><span>1</span>' in routing
    assert 'value="1"><span>3</span>' in routing
    assert any("experts/expert_shares: rows are layers 1, 3;" in page for page in pages)
    assert {"layers/load_balancing_loss_01", "layers/load_balancing_loss_03"} <= step.keys()
    records = _parsed(path)
    (started,) = [record.run for record in records if record.HasField("run")]
    assert (started.run_group, list(started.tags)) == ("sweep", ["small", "first"])
    configured = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert configured["facts"] == facts
    assert configured["tracking"]["group"] == "sweep"
    assert [record.artifact.type for record in records if record.HasField("artifact")] == ["report"]


def test_a_wandb_that_fails_twice_ends_and_metrics_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    warnings: list[str] = []
    tracker = Tracker(load_config(["tracking=wandb"]), tmp_path, resumed=False, warn=warnings.append)
    for step in range(1, 7):
        if step in (2, 4):
            assert tracker._wandb is not None
            tracker._wandb._run.finish()  # logging to a finished run is refused by W&B
        tracker.log(FIGURES | {"step": step})
    tracker.close()
    stopped = [text for text in warnings if text.startswith("W&B stopped")]
    assert ["has every step" in text for text in stopped] == [True, False]
    assert "metrics.jsonl goes on" in stopped[1]
    second = stopped[0].partition("/wandb/")[2].split()[0]
    (path,) = tmp_path.glob(f"wandb/{second}/*.wandb")
    assert [step["_step"] for step in history(path)] == [1, 2, 3]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_the_time_limit_of_the_start_is_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short limit for a server must not cost the offline run, whose service takes its time on a busy machine."""
    import wandb

    limits: dict[str, float] = {}

    def init(*, mode: str, settings: Any, **_: Any) -> None:
        limits[mode] = settings.init_timeout
        raise OSError("it doesn't answer")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    warnings: list[str] = []
    Tracker(load_config(["tracking=wandb"]), tmp_path, resumed=False, warn=warnings.append).close()
    assert limits == {"online": 2.0, "offline": 60.0}
    assert len(warnings) == 1, warnings


def test_what_is_not_finite_is_null_and_no_point_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(load_config(["tracking=wandb"]), tmp_path, resumed=False, warn=[].append)
    bad = {"lm_loss": math.nan, "grad_norm": math.inf, "val_loss_by_source": {"prose": -math.inf}}
    shares, layers = [[0.25, math.nan], [0.5, 0.5]], [math.nan, 1.0]
    tracker.log(FIGURES | bad | {"expert_shares": shares, "load_balancing_loss_layers": layers})
    tracker.close()
    strict = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    nulls = {"lm_loss": None, "grad_norm": None, "val_loss_by_source": {"prose": None}}
    nulls |= {"expert_shares": [[0.25, None], [0.5, 0.5]], "load_balancing_loss_layers": [None, 1.0]}
    assert strict == FIGURES | nulls
    found = logged(tmp_path)
    assert found["train/loss"] == FIGURES["loss"]
    absent = {"train/lm_loss", "train/grad_norm", "val/loss_by_source/prose", "layers/load_balancing_loss_00"}
    assert not found.keys() & absent
    assert found["layers/load_balancing_loss_01"] == 1.0
    assert sum(found["experts/expert_shares/values"]) == 3, "the one that is none is left out"


def test_tracking_none_writes_metrics_alone(tmp_path: Path) -> None:
    tracker = Tracker(load_config(["tracking=none"]), tmp_path, resumed=False, warn=pytest.fail)
    tracker.log(FIGURES)
    tracker.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def _log_into_a_full_disk(folder: Path) -> list[str]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    warnings: list[str] = []
    tracker = Tracker(load_config(["tracking=none"]), folder, resumed=False, warn=warnings.append)
    limit = 3 * (len(json.dumps(FIGURES)) + 1) + 10  # three lines and a bit
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for step in range(1, 6):
        tracker.log(FIGURES | {"step": step})
    tracker.close()
    return warnings


def test_a_full_disk_costs_whole_lines_and_says_so(tmp_path: Path) -> None:
    warnings = run_ranks(1, _log_into_a_full_disk, tmp_path)[0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert ["step 4" in warnings[0], "step 5" in warnings[1], len(warnings)] == [True, True, 2]


NETRCS = [b"machine api.wandb.ai login x password \xff\n", b"machine\n", b"\x00"]
URLS = ["http://[::1", "not a url", "", "https://"]


def _started(folder: Path, **variables: str) -> tuple[list[str], str]:
    """(warnings, stderr) of a run with these variables, in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from moe.config.compose import load_config\n"
        "from moe.train.tracking import Tracker; from tests.unit.train.test_tracking import FIGURES\n"
        "folder = Path(sys.argv[1])\n"
        "tracker = Tracker(load_config(['tracking=wandb']), folder, resumed=False, warn=print)\n"
        "tracker.log(FIGURES); tracker.close()"
    )
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, env=inherited | variables, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("netrc", NETRCS[:1])
def test_a_netrc_that_cannot_be_read_is_one_warning(netrc: bytes, tmp_path: Path) -> None:
    path = tmp_path / "netrc"
    path.write_bytes(netrc)
    warnings, error = _started(tmp_path, NETRC=str(path))
    assert len(warnings) == 1, warnings
    assert warnings[0].startswith(f"W&B is offline: {path} can't be read ('utf-8' codec can't decode byte 0xff")
    assert error == ""
    assert logged(tmp_path)["train/loss"] == FIGURES["loss"]


@pytest.mark.parametrize("url", URLS[:2])
def test_a_broken_base_url_is_one_warning(url: str, tmp_path: Path) -> None:
    warnings, error = _started(tmp_path, WANDB_BASE_URL=url, WANDB_API_KEY="0" * 40)
    assert len(warnings) == 1, warnings
    assert warnings[0].startswith(f"W&B is offline: WANDB_BASE_URL={url} must be an address as in https://api.wandb.ai")
    assert error == ""
    assert logged(tmp_path)["train/loss"] == FIGURES["loss"]
