"""Upcycling: the same function at step 0, what noise and re-initialisation change, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe.checkpoint.reader import read_model, resolve
from moe.checkpoint.state import read_state
from moe.config import ExportConfig, Mlp, UpcycleConfig
from moe.config.compose import ConfigError, load_config, read_config
from moe.errors import UserError
from moe.interop.exporting import run_export
from moe.interop.importing import import_model
from moe.interop.tensor_source import CheckpointTensors
from moe.interop.upcycling import run_upcycle, upcycled_config
from tests.unit.interop.made import assert_logits_equal, hub_folder, tokens, transformers

FFN = 40  # of the dense model


def upcycle(dense: Path, run: Path, **options: Any) -> Path:
    said = run_upcycle(UpcycleConfig(checkpoint=str(dense), run_dir=str(run), **options), pytest.fail)
    assert said.startswith(f"{run}: ")
    return run


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    hub_folder(folder / "hub", "mistral", intermediate_size=FFN, sliding_window=9)
    import_model(folder / "hub", folder / "run")
    return folder


def test_a_tokenizer_with_more_pieces_than_the_model_is_refused(dense: Path, tmp_path: Path) -> None:
    hub_folder(tmp_path / "hub", "mistral", vocab_size=100)
    with pytest.raises(UserError, match="its tokenizer has 500 pieces, and vocab_size=100"):
        upcycle(tmp_path / "hub", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_sparse_model_has_no_shared_experts(dense: Path, tmp_path: Path) -> None:
    config = read_config(dense / "run" / "config.yaml")
    config.model.n_shared_experts = 1  # which says nothing in a dense model
    sparse = upcycled_config(config, UpcycleConfig(checkpoint="dense", run_dir="run"), tmp_path)
    assert sparse.model.n_shared_experts == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_experts": 8, "top_k": 4, "granularity": 2},
        {"num_experts": 15, "top_k": 5, "granularity": 5},
        {"num_experts": 4, "top_k": 3, "sparse_layers": "every_2"},
    ],
)
@pytest.mark.parametrize("source", ["run", "hub"])
@torch.no_grad()
def test_computes_what_the_dense_model_does(source: str, options: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    run = upcycle(dense / source, tmp_path / "sparse", **options)
    config = read_config(run / "config.yaml")
    assert config.model.mlp is Mlp.sparse
    assert config.model.expert_size == FFN // options.get("granularity", 1)
    assert read_state(run).tokenizer == read_state(dense / "run").tokenizer
    ids = tokens(4, 60)
    ours, before = read_model(resolve(run))(ids), read_model(resolve(dense / "run"))(ids).logits_BSV
    assert ours.logits_BSV is not None
    assert before is not None
    assert_logits_equal(ours.logits_BSV, before)
    counts = torch.stack([router.counts_E for router in ours.routers])
    assert (counts > 0).all()  # every expert was used
    if parts := options.get("granularity"):  # a copy's parts are chosen together
        assert (counts.unflatten(1, (-1, parts)) == counts[:, ::parts, None]).all()


@torch.no_grad()
def test_opens_in_transformers(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
    settings = {"rope_parameters": rope | {"original_max_position_embeddings": 16}}
    folder = hub_folder(tmp_path / "hub", "llama", torch.bfloat16, **settings)
    run = upcycle(folder, tmp_path / "sparse", num_experts=6, top_k=2, granularity=2)
    assert {info.dtype for info in CheckpointTensors(run).infos().values()} == {torch.bfloat16}
    run_export(ExportConfig(checkpoint=str(run), path=str(tmp_path / "exported")), pytest.fail)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    assert type(opened).__name__ == "MixtralForCausalLM"
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_logits_equal(opened(tokens(2, 50)).logits, dense(tokens(2, 50)).logits)


def _experts(run: Path, layer: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """gate and up [E, f, H] and down [E, f, H] of a layer."""
    source, prefix = CheckpointTensors(run), f"model.layers.{layer}.mlp.experts"
    gate, up = source.read(f"{prefix}.gate_up_proj").chunk(2, 1)
    return gate, up, source.read(f"{prefix}.down_proj").transpose(1, 2)


def test_reinitialisation_draws_whole_hidden_dimensions(dense: Path, tmp_path: Path) -> None:
    run = upcycle(dense / "run", tmp_path / "sparse", reinit_ratio=0.3)
    plain = _experts(upcycle(dense / "run", tmp_path / "plain"))
    changed = [(ours != before).all(2) for ours, before in zip(_experts(run), plain, strict=True)]
    assert torch.equal(changed[0], changed[1])
    assert torch.equal(changed[0], changed[2])
    assert (changed[0].sum(1) == round(0.3 * FFN)).all()
    assert len({tuple(row.tolist()) for row in changed[0]}) == 8  # other dimensions in each expert
    kept = ~changed[0]
    assert all(torch.equal(ours[kept], before[kept]) for ours, before in zip(_experts(run), plain, strict=True))
    drawn = _experts(run)[0][changed[0]]
    assert drawn.std() == pytest.approx(plain[0].std().item(), rel=0.05)
    again = _experts(upcycle(dense / "run", tmp_path / "again", reinit_ratio=0.3))
    assert all(torch.equal(ours, other) for ours, other in zip(_experts(run), again, strict=True))
    other = _experts(upcycle(dense / "run", tmp_path / "other", reinit_ratio=0.3, seed=1))
    assert not torch.equal(other[0], again[0])


def test_noise_is_a_share_of_the_standard_deviation(dense: Path, tmp_path: Path) -> None:
    noisy = _experts(upcycle(dense / "run", tmp_path / "noisy", noise=0.1))
    plain = _experts(upcycle(dense / "run", tmp_path / "plain"))
    for ours, before in zip(noisy, plain, strict=True):
        assert (ours - before).std().item() == pytest.approx(0.1 * before.std().item(), rel=0.05)
    assert not torch.equal(noisy[0][0], noisy[0][1])


def test_what_cannot_be_upcycled(dense: Path, tmp_path: Path) -> None:
    run = upcycle(dense / "run", tmp_path / "sparse")
    with pytest.raises(UserError, match="it has experts already"):
        upcycle(run, tmp_path / "twice")
    with pytest.raises(UserError, match="granularity=3 must divide the dense model's intermediate_size=40"):
        upcycle(dense / "run", tmp_path / "odd", num_experts=6, top_k=3, granularity=3)
    with pytest.raises(UserError, match=r"run_dir=.*sparse exists"):
        upcycle(dense / "run", run)
    assert {path.name for path in tmp_path.iterdir()} == {"sparse"}


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["top_k=1"], "top_k=1 must be ≥ 2"),
        (["top_k=9"], "top_k=9 must be ≤ num_experts=8"),
        (["granularity=3"], "num_experts=8 must be divisible by granularity=3"),
        (["granularity=4"], "top_k=2 must be divisible by granularity=4"),
        (["reinit_ratio=1.5"], "reinit_ratio=1.5 must be in [0, 1]"),
        (["noise=-1"], "noise=-1.0 must be ≥ 0"),
        (["checkpoint="], "checkpoint='' must name"),
        (["experts=3"], "experts"),
    ],
)
def test_options(overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["checkpoint=a", "run_dir=b", *overrides], "upcycle", UpcycleConfig)
    assert text in str(caught.value)
