"""What an evaluation writes for the report, and how it reads routers that look at later tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moe.config.compose import load_config
from moe.data.loader import Batch
from moe.distributed.mesh import Mesh
from moe.model.transformer import Transformer
from moe.sparse import routers_of
from moe.sparse.routers import Choices, RouterOutput
from moe.train.evaluate import Evaluation, _first_experts
from moe.train.held_out import HeldOutRouting


def _routed(tokens: list[int], experts: list[int], count: int) -> RouterOutput:
    choices = Choices(torch.tensor(tokens).long(), torch.tensor(experts).long(), torch.ones(len(tokens)), count)
    nothing_TE = torch.zeros(count, 3)
    return RouterOutput(choices, nothing_TE, nothing_TE, torch.bincount(choices.experts_N, minlength=3), {}, {})


def test_a_tokens_first_row_is_its_first_expert_and_a_token_without_rows_has_none() -> None:
    routed = _routed([0, 0, 2, 3, 3, 3], [2, 1, 0, 1, 0, 2], 5)
    assert _first_experts(routed, 5) == [2, None, 0, 1, None]
    assert _first_experts(routed, 2) == [2, None]
    assert _first_experts(_routed([], [], 2), 2) == [None, None]


def _model(router: str) -> Transformer:
    config = load_config([f"router={router}", "model.hidden_size=32", "model.num_hidden_layers=2",
                          "model.vocab_size=300", "tokenizer.vocab_size=300",
                          "model.initializer=normal", "model.initializer_range=0.3"])  # fmt: skip
    model = Transformer(config.model, config.router, config.experts)
    model.init_weights(0)
    return model.double()


def _evaluated(model: Transformer) -> dict[str, Any]:
    ids = torch.randint(0, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(4, dtype=torch.int64)
    batch = Batch(ids, ids.roll(-1, 1), torch.zeros_like(ids, dtype=torch.int32), torch.arange(4), zeros)
    tokenizer = SimpleNamespace(token_bytes=lambda: np.ones(300), piece=str)
    corpus: Any = SimpleNamespace(tokenizer=tokenizer, source_names=["text"])
    mesh = Mesh(0, 1, 0, 1, 1, torch.device("cpu"))
    return Evaluation(corpus, [batch], mesh, 300)(model, lambda name: None).metrics


def test_held_out_balance_and_norms_leave_out_what_only_fills_sequences() -> None:
    model, mesh = _model("topk").eval(), Mesh(0, 1, 0, 1, 1, torch.device("cpu"))
    ids = torch.randint(0, 300, (3, 24), generator=torch.Generator().manual_seed(0))
    documents = torch.zeros_like(ids, dtype=torch.int32)
    documents[0, 10:], documents[1, 5:] = 1, 1
    labels, real_T = ids.roll(-1, 1), torch.cat([torch.arange(10), torch.arange(24, 48)])
    labels[0, 10:] = -100  # fills the sequence, as the third does the batch; the second's last document has no target
    labels[1, 5:] = -100
    batch = Batch(ids, labels, documents, torch.tensor([0, 1, -1]), torch.zeros(3, dtype=torch.int64), real_T)
    with torch.no_grad():
        everything = model(ids, document_ids_BS=documents).routers
        held_out = HeldOutRouting(model, mesh)
        held_out.add(batch, model(ids, document_ids_BS=documents, real_T=real_T).routers)
    held_out.close()
    expected = []
    for routed in everything:
        chosen = torch.zeros(3, 24, 8)
        tokens_N, experts_N = routed.choices.tokens_N, routed.choices.experts_N
        chosen[tokens_N // 24, tokens_N % 24, experts_N] = 1
        counts_E = chosen[0, :10].sum(0) + chosen[1].sum(0)
        expected.append((counts_E.max() / counts_E.mean() - 1).item())
    rows_E = [norms[1].sum().item() for norms in held_out._norms]
    found, _, _ = held_out.metrics("")
    assert rows_E == [2.0 * 34, 2.0 * 34]
    assert found["val_max_violation_layers"] == pytest.approx(expected, rel=1e-6)


def test_only_routers_that_look_ahead_are_scored_twice() -> None:
    assert "val_loss_leaky" not in _evaluated(_model("topk"))
    model = _model("expert_choice").train()
    metrics = _evaluated(model)
    assert metrics["val_loss"] != metrics["val_loss_leaky"]
    assert metrics["val_loss_leaky"] == pytest.approx(metrics["val_loss"], rel=0.2)
    assert model.training
    assert not any(router.reads_prefix for router in routers_of(model))


def test_the_causal_reading_of_a_whole_model_is_causal() -> None:
    model = _model("expert_choice").eval()
    ids = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 12:] = (ids[:, 12:] + 7) % 300
    apart = []
    for prefix in (False, True):
        for router in routers_of(model):
            router.reads_prefix = prefix
        before, after = (model(x).logits_BSV[:, :12] for x in (ids, changed))
        apart.append((before - after).abs().max().item())
    assert apart[0] > 1e-3
    assert apart[1] < 1e-12
