"""`moe bench`: both sides compute the same, real runs with a small shape, and bad overrides give one-line errors."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from moe.bench import BENCHMARKS, peer, peers, run_bench
from moe.bench.peer import IMPLEMENTATIONS, Arithmetic, Peer, loss_gap, peer_model, targets_of
from moe.bench.stepper import batch_of
from moe.model.transformer import Transformer
from tests import forkserver

SMALL = [
    "model.vocab_size=320", "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=2",
    "model.num_attention_heads=4", "model.num_key_value_heads=2", "train.sequence_length=16",
    "train.micro_batch_size=2", "train.global_batch_size=2",
]  # fmt: skip


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_of_the_table_can_be_run(name: str) -> None:
    assert callable(importlib.import_module(f"moe.bench.{name}").run)


def test_defaults_are_the_benchmark_shape() -> None:
    keys, config = peers.parse(["rounds=3"])
    model, train = config.model, config.train
    assert (model.hidden_size, model.intermediate_size, model.num_hidden_layers) == (256, 896, 4)
    assert (model.num_attention_heads, model.num_key_value_heads, model.vocab_size) == (8, 2, 4096)
    assert (config.router.num_experts, config.router.top_k) == (8, 2)
    assert (train.global_batch_size, train.sequence_length, keys.rounds) == (4, 512, 3)


def test_both_sides_have_the_same_loss_and_gradients() -> None:
    pytest.importorskip("transformers")
    _, config = peers.parse([*SMALL, "router.z_loss_coef=0", "router.aux_loss_coef=0"])
    ours = Transformer(config.model, config.router, config.experts)
    ours.init_weights(0)
    other = peer_model(config)
    other.load_state_dict(ours.state_dict())
    ids = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(0))
    assert loss_gap(ours, other, ids) <= 1e-6
    other(input_ids=ids, labels=ids).loss.backward()
    (ours(ids, labels_BS=batch_of(ids).labels_BS).lm_loss_sum / targets_of(ids)).backward()
    theirs = dict(other.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.gate.weight"])
def test_sides_that_differ_are_not_compared(name: str) -> None:
    pytest.importorskip("transformers")
    _, config = peers.parse(SMALL)
    ours = Transformer(config.model, config.router, config.experts)
    ours.init_weights(0)
    other = peer_model(config)
    other.load_state_dict(ours.state_dict())
    with torch.no_grad():
        other.get_parameter(name).mul_(2)
    ids = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="compute different things"):
        loss_gap(ours, other, ids)


def run_peers(*overrides: str) -> list[str]:
    pytest.importorskip("transformers")
    command = [sys.executable, "-m", "moe", "bench", "peers", "rounds=2", "steps=1", *SMALL, *overrides]
    done = forkserver.run(
        command, capture_output=True, text=True, timeout=240, check=False, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def speed_of(lines: list[str], start: str) -> float:
    row = next(line for line in lines if line.startswith(start))
    return float(re.split(r" {2,}", row)[1].replace(",", ""))


def ratio(line: str) -> float:
    *words, number = line.split()
    assert words == ["ratio", "tokens/s"]
    return float(number)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "ours, DeepSpeed ZeRO-1"),
        (["parallel.zero_stage=2"], "ours, DeepSpeed ZeRO-2"),
        (["engine=plain"], "ours, plain engine"),
    ],
)
def test_our_side_is_named_by_its_engine(overrides: list[str], name: str) -> None:
    assert peers.our_name(peers.parse([*SMALL, *overrides])[1]) == name


def test_peers_runs_and_ends_with_the_ratio() -> None:
    lines = run_peers()
    assert [line.split(":")[0] for line in lines if line.startswith("peer's experts")] == [
        f"peer's experts, {name}" for name in IMPLEMENTATIONS
    ]
    assert speed_of(lines, "ours, DeepSpeed ZeRO-1") > 0
    assert speed_of(lines, "transformers, ") > 0
    layers = [re.split(r" {2,}", line) for line in lines if line.startswith("sparse layer, ")]
    assert [cells[:2] for cells in layers if "DeepSpeed" in cells[1]] == [
        [f"sparse layer, {routing} routing", "DeepSpeed's MoE"] for routing in ("own", "uniform")
    ]
    assert float(lines[-2].removeprefix("ratio to DeepSpeed's MoE layer ")) > 0
    assert ratio(lines[-1]) > 0


def test_in_bfloat16_the_peer_keeps_float32_master_weights_and_its_float32_step_is_there_too() -> None:
    lines = run_peers("precision=bfloat16")
    tried = [line.split(":")[0] for line in lines if line.startswith("peer's experts")]
    for name in ("eager, autocast", "eager, bfloat16 weights", "eager", "eager, pure bfloat16"):
        assert f"peer's experts, {name}" in tried
    table = [line for line in lines if re.match(r"transformers, .* {2,}\d", line)]
    assert [line.split("  ")[0].endswith("pure bfloat16") for line in table] == [False, False, True]
    assert any(line.startswith("ratio to pure bfloat16 ") for line in lines)
    assert any(line.startswith("first loss in bfloat16: ours is ") for line in lines)
    assert any(line.startswith("ratio to float32 ") for line in lines)
    assert ratio(lines[-1]) > 0


def test_a_step_with_master_weights_is_adamws() -> None:
    """Weights after a step: the rounded float32 copies, which moved by float32 AdamW on the bfloat16 gradients."""
    pytest.importorskip("transformers")
    _, config = peers.parse([*SMALL, "precision=bfloat16", "optim.max_grad_norm=1e9"])
    weights = {name: value.detach().clone() for name, value in peer_model(config).state_dict().items()}
    side = Peer(weights, config, Arithmetic.master, "eager", torch.device("cpu"))
    twin = peer_model(config)
    twin.load_state_dict(weights)
    twin.to(torch.bfloat16)
    ids = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(0))
    twin(input_ids=ids, labels=ids).loss.backward()
    side(ids)
    for name, parameter in twin.named_parameters():
        decay = 1 - config.optim.lr * config.optim.weight_decay * (parameter.ndim >= 2)
        gradient = parameter.grad.float()
        moved = weights[name] * decay - config.optim.lr * gradient / (gradient.abs() + config.optim.eps)
        torch.testing.assert_close(side.model.get_parameter(name), moved.bfloat16(), atol=1e-5, rtol=1e-2, msg=name)


def test_a_pure_bfloat16_step_moves_the_bfloat16_weights_themselves() -> None:
    pytest.importorskip("transformers")
    _, config = peers.parse([*SMALL, "precision=bfloat16"])
    weights = {name: value.detach().clone() for name, value in peer_model(config).state_dict().items()}
    side = Peer(weights, config, Arithmetic.pure, "eager", torch.device("cpu"))
    ids = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(0))
    first = side.lm_loss(ids)
    for _ in range(5):
        side(ids)
    assert {parameter.dtype for parameter in side.model.parameters()} == {torch.bfloat16}
    assert side.lm_loss(ids) < first - 0.01


def test_a_side_that_is_hopeless_beside_a_known_step_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    _, config = peers.parse([*SMALL, "precision=bfloat16"])
    weights = {name: value.detach().clone() for name, value in peer_model(config).state_dict().items()}
    monkeypatch.setattr(peers, "LONG_STEP", 0.0)
    monkeypatch.setattr(peers, "HOPELESS", 1e6)  # a step that the machine slows is never so much slower than another
    device = torch.device("cpu")
    batches = peers.batches_of(config, device)
    for known, left_out in ((1e-12, True), (1e6, False)):
        found, _ = peers._fastest(weights, config, [Arithmetic.pure], batches, device, print, known)
        assert (found is None) == left_out
    lines = capsys.readouterr().out.splitlines()
    assert ["left out, its first step took" in line for line in lines] == [True] * 3 + [False] * 3


def test_table_takes_the_ratio_inside_each_round() -> None:
    _, config = peers.parse([])
    # The machine's speed changes tenfold between rounds; ours is always 1.5, 2 and 3 times the peer.
    speeds = [{"ours": 300.0, "peer": 100.0}, {"ours": 15.0, "peer": 10.0}, {"ours": 2000.0, "peer": 1000.0}]
    rounds = [peers.Round(each, peak=1e12, max_violation=0.5) for each in speeds]
    results = peers.results(config, rounds, {"ours": "ours", "peer": "transformers"})
    lines = list(results.lines())
    assert lines[-1] == "ratio tokens/s 2.00"
    assert lines[-2] == "beside transformers: ratio per round 1.50 to 3.00; the rounds disagree: the machine is busy"
    assert "ours has MaxVio 0.50" in lines[-3]
    assert results.tables[0].rows[0][:2] == ["ours", 300.0]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["speed"], "no such benchmark; one of roofline, kernels, step, peers, threads, startup, decode"),
        (["peers", "rounds=0"], "rounds=0 must be ≥ 1"),
        (["peers", "steps=x"], "steps=x must be a whole number"),
        (["peers", "train.sequenc_length=4"], "train.sequenc_length=4: no such key"),
        (["peers", "model=mistral_7b"], "model.mlp=dense must be sparse"),
        (["peers", "router.capacity_factor=1.0"], "router.capacity_factor=1.0 must be null"),
        (["peers", "router=lossfree"], "router.scoring_func=sigmoid must be softmax: the peer is a Mixtral"),
        (["peers", "model.n_shared_experts=1"], "model.n_shared_experts=1 must be 0: the peer is a Mixtral"),
        (["peers", "precision=float16"], "train.precision=float16 must be one of"),
        (["peers", "train.global_batch_size=8"], "train.micro_batch_size=4 must equal train.global_batch_size=8"),
        (
            ["peers", "parallel.expert_parallel_size=2"],
            "parallel.expert_parallel_size=2 must divide the number of ranks, 1",
        ),
        (["attention", "window=0"], "its only key is window=N"),
        (["attention", "rounds=2"], "its only key is window=N"),
        (["attention", "json=no/such/file"], "json=no/such/file must be a file in a folder that exists"),
        (["attention", "json="], "json= must be a file"),
        (["attention", "plot=no/such/file"], "plot=no/such/file must be a file in a folder that exists"),
    ],
)
def test_bad_overrides_are_one_line(overrides: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=text.replace(".", r"\.")) as caught:
        run_bench(overrides)
    assert "\n" not in str(caught.value)


def test_json_and_plot_get_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plot = tmp_path / "results.json", tmp_path / "plot.svg"
    run_bench(["attention", "window=64", f"json={file}", f"plot={plot}"])
    values = json.loads(file.read_text())
    assert values["tables"][0]["columns"] == ["per token", "short sequence", "long sequence"]
    lines = [line.replace("{}", f"{number:.2f}") for line, number in values["figures"].items()]
    assert capsys.readouterr().out.splitlines()[-2:] == lines
    assert f">attention window=64: {'; '.join(lines)}.</desc>" in plot.read_text()


def test_missing_transformers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'moe-train\[dev\]'"):
        run_bench(["peers", *SMALL])


@pytest.mark.slow  # up to seven processes that import both libraries
@pytest.mark.parametrize(("overrides", "peers_tried"), [([], 3), (["precision=bfloat16"], 6)], ids=str)
def test_memory_of_both_sides_is_that_of_processes_of_their_own(overrides: list[str], peers_tried: int) -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, "-m", "moe", "bench", "memory_peers", "rounds=1", "steps=1", *SMALL, *overrides]
    done = forkserver.run(
        command, capture_output=True, text=True, timeout=280, check=False, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 0, done.stderr
    _, *rows, told, last = done.stdout.splitlines()
    peaks = {(cells := re.split(r" {2,}", row))[0]: float(cells[1].replace(",", "")) for row in rows}
    assert len(peaks) == 1 + peers_tried
    assert all(peak > 100 for peak in peaks.values())  # torch alone has more
    ours, *theirs = peaks.values()
    assert told.startswith("medians, 1 step a round, beside transformers, ")
    assert last.startswith("ratio peak memory ")
    assert float(last.split()[-1]) == pytest.approx(ours / min(theirs), abs=0.01)


def test_without_a_name_all_benchmarks_are_listed(capsys):
    run_bench([])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in listed] == list(BENCHMARKS)
    assert all(about in line for line, about in zip(listed, BENCHMARKS.values(), strict=True))
