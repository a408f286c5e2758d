"""Every metric reaches metrics.jsonl and W&B's own file, the load-balancing loss first; W&B can't cost the run."""

from __future__ import annotations

import json
import math
import resource
import signal
import struct
from pathlib import Path

import pytest

from moe.config.compose import load_config
from moe.train.tracking import Tracker, has_key
from tests.ranks import run_ranks

FIGURES = {
    "step": 1, "tokens": 64, "loss": 3.5, "lm_loss": 3.4, "load_balancing_loss": 1.25, "router_z_loss": 0.5,
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


def history(path: Path) -> list[dict[str, float]]:
    """Every logged step of a .wandb file, as W&B itself would upload it."""
    from wandb.proto import wandb_internal_pb2

    steps = []
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            steps.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return steps


def logged(run_dir: Path) -> dict[str, float]:
    """The newest values of the only offline run."""
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    values: dict[str, float] = {}
    for step in history(path):
        values |= step
    return values


def test_wandb_gets_the_balance_in_total_and_per_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    warnings: list[str] = []
    tracker = Tracker(load_config(["tracking=wandb"]), tmp_path, resumed=False, warn=warnings.append)
    tracker.log(FIGURES)
    tracker.close()
    history = logged(tmp_path)
    assert history["balance/load_balancing_loss"] == 1.25
    assert history["balance/load_balancing_loss_layer_00"] == 1.5
    assert history["balance/load_balancing_loss_layer_01"] == 1.0
    assert history["experts/layer_00/share_01"] == 0.75
    assert history["val/loss_prose"] == 2.5
    sections = sorted({key.partition("/")[0] for key in history if "/" in key})
    assert sections[0] == "balance", "W&B shows sections in alphabetical order"
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == FIGURES
    assert len(warnings) == 1
    assert "wandb sync" in warnings[0]


def test_a_wandb_that_fails_twice_ends_and_metrics_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    warnings: list[str] = []
    tracker = Tracker(load_config(["tracking=wandb"]), tmp_path, resumed=False, warn=warnings.append)
    for step in range(1, 7):
        if step in (2, 4):
            assert tracker._run is not None
            tracker._run.finish()  # logging to a finished run is refused by W&B
        tracker.log(FIGURES | {"step": step})
    tracker.close()
    stopped = [text for text in warnings if text.startswith("W&B stopped")]
    assert ["has every step" in text for text in stopped] == [True, False]
    assert "metrics.jsonl goes on" in stopped[1]
    second = stopped[0].partition("/wandb/")[2].split()[0]
    (path,) = tmp_path.glob(f"wandb/{second}/*.wandb")
    assert [step["_step"] for step in history(path)] == [1, 2, 3]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


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
    absent = {"train/lm_loss", "train/grad_norm", "val/loss_prose", "balance/load_balancing_loss_layer_00"}
    assert not found.keys() & (absent | {"experts/layer_00/share_01"})
    assert found["balance/load_balancing_loss_layer_01"] == 1.0


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


@pytest.mark.parametrize("netrc", [b"machine api.wandb.ai login x password \xff\n", b"machine\n", b"\x00"])
def test_a_netrc_that_cannot_be_read_is_no_key(netrc, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_bytes(netrc)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not has_key()


@pytest.mark.parametrize("url", ["http://[::1", "not a url", "", "https://"])
def test_a_broken_base_url_costs_one_warning_and_not_the_run(url, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    warnings = []
    tracker = Tracker(load_config([f"run_dir={tmp_path}"]), tmp_path, resumed=False, warn=warnings.append)
    tracker.log(FIGURES | {"step": 1})
    tracker.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert 1 <= len(warnings) <= 2
