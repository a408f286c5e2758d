"""Expert parallelism over forked gloo ranks equals one process on the whole batch; one launch for each world size."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.config import DropPolicy, ExpertBackend, ExpertChoiceRouterConfig, ExpertsConfig, TopKRouterConfig
from moe.sparse import SparseMLP, build_sparse_mlp
from tests.ranks import run_ranks

HIDDEN, INNER, LENGTH, EXPERTS = 16, 24, 12, 8


@dataclass(slots=True)
class Case:
    """`closed`: experts that no token is routed to; `closed_on_first`: experts that no token of rank 0 is routed to."""

    router: dict[str, Any] = field(default_factory=dict)
    closed: tuple[int, ...] = ()
    closed_on_first: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    backend: ExpertBackend = ExpertBackend.auto
    expert_choice: bool = False
    shared: bool = False
    chunks: int = 1

    def layer(self, group: dist.ProcessGroup | None) -> SparseMLP:
        kind = ExpertChoiceRouterConfig if self.expert_choice else TopKRouterConfig
        config = kind(**{"num_experts": EXPERTS, **self.router})
        shared = nn.Linear(HIDDEN, HIDDEN) if self.shared else None
        experts = ExpertsConfig(backend=self.backend, exchange_chunks=self.chunks)
        layer = build_sparse_mlp(HIDDEN, INNER, config, experts, shared_experts=shared, expert_group=group)
        if shared is not None:
            for parameter in shared.parameters():
                nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(6))
        with torch.no_grad():
            for _, weight, seed in layer.experts.draws(lambda name, expert: len(name) * 100 + expert):
                weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
        torch.nn.init.normal_(layer.gate.weight, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():  # x's first feature is 1 everywhere, its second on rank 0 only
            layer.gate.weight[:, :2] = 0
            layer.gate.weight[list(self.closed), 0] = -1e3
            layer.gate.weight[list(self.closed_on_first), 1] = -1e3
        return layer.to(self.dtype)

    def batch(self, ranks: int) -> tuple[list[Tensor], list[Tensor]]:
        """(inputs, output gradients) by rank, each [B, S, H]; the last rank has one sequence more than the others."""
        generator = torch.Generator().manual_seed(7)
        sizes = [2] * (ranks - 1) + [3]
        xs = [torch.randn(size, LENGTH, HIDDEN, generator=generator).to(self.dtype) for size in sizes]
        for rank, x_BSH in enumerate(xs):
            x_BSH[..., 0], x_BSH[..., 1] = 1, float(rank == 0)
        return xs, [torch.randn(x.shape, generator=generator).to(self.dtype) for x in xs]


CASES = {
    "dropless": Case(),
    "float64": Case(dtype=torch.float64),
    "bfloat16": Case(dtype=torch.bfloat16),
    "loop": Case(backend=ExpertBackend.loop),
    "top 1": Case({"top_k": 1, "norm_topk_prob": False}),
    "all experts": Case({"top_k": EXPERTS}),
    "an expert idle on one rank": Case(closed_on_first=(3,)),
    "an expert idle on all ranks": Case(closed=(2,)),
    "all experts of the last rank idle": Case(closed=(4, 5, 6, 7)),
    "the first rank sends nothing to itself": Case(closed_on_first=(0, 1, 2, 3)),
    "all on one expert": Case({"top_k": 1, "norm_topk_prob": False}, closed=(0, 1, 2, 3, 4, 6, 7)),
    "capacity by position": Case({"capacity_factor": 0.75}),
    "capacity by probability": Case({"capacity_factor": 0.75, "drop_policy": DropPolicy.probability}),
    "capacity, rank idle": Case({"capacity_factor": 0.75}, closed=(4, 5, 6, 7)),
    "expert choice": Case(expert_choice=True),
    "expert choice, float64": Case(expert_choice=True, dtype=torch.float64),
    "expert choice, every token to every expert": Case({"capacity_factor": EXPERTS}, expert_choice=True),
    "shared experts": Case(shared=True),
    "two chunks": Case(chunks=2),
    "two chunks, float64": Case(chunks=2, dtype=torch.float64),
    "two chunks, bfloat16": Case(chunks=2, dtype=torch.bfloat16),
    "three chunks, shared experts": Case(chunks=3, shared=True),
    "two chunks, capacity": Case({"capacity_factor": 0.75}, chunks=2),
    "two chunks, expert choice": Case(chunks=2, expert_choice=True),
    "eight chunks, one choice, capacity": Case({"top_k": 1, "norm_topk_prob": False, "capacity_factor": 0.1}, chunks=8),
    "two chunks, rank idle": Case(closed=(4, 5, 6, 7), chunks=2),
    "loop, rank idle": Case(closed=(4, 5, 6, 7), backend=ExpertBackend.loop),
}


def _step(layer: SparseMLP, x_BSH: Tensor, grad_BSH: Tensor) -> dict[str, Tensor]:
    x_BSH = x_BSH.clone().requires_grad_()
    y_BSH, routed = layer(x_BSH)
    y_BSH.backward(grad_BSH)
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert all(gradient is not None for gradient in grads.values())
    return {"y": y_BSH.detach(), "x": x_BSH.grad, "counts": routed.counts_E, "dropped": routed.dropped, **grads}


def _rank_runs_all_cases(store: str, ranks: int) -> dict[str, dict[str, Tensor]]:
    import os

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        results = {}
        for name, case in CASES.items():
            xs, grads = case.batch(ranks)
            results[name] = _step(case.layer(dist.group.WORLD), xs[rank], grads[rank])
        with pytest.raises(ValueError, match=f"parallel.expert_parallel_size={ranks} must divide router.num_experts=9"):
            build_sparse_mlp(
                HIDDEN, INNER, TopKRouterConfig(num_experts=9), ExpertsConfig(), expert_group=dist.group.WORLD
            )
        return results
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    store = tmp_path_factory.mktemp("store") / "rendezvous"
    return run_ranks(request.param, _rank_runs_all_cases, str(Path(store)), request.param, timeout=90)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", CASES)
def test_expert_parallel_equals_one_process(name: str, runs: list[dict[str, Any]]) -> None:
    case, results = CASES[name], [run[name] for run in runs]
    xs, grads = case.batch(len(runs))
    expected = _step(case.layer(None), torch.cat(xs), torch.cat(grads))
    ours = {
        key: torch.cat([r[key] for r in results]) for key in ("y", "x", "experts.gate_up_proj", "experts.down_proj")
    }
    summed = [
        key for key in expected if key in ("counts", "dropped", "gate.weight") or key.startswith("shared_experts")
    ]
    ours |= {key: torch.stack([r[key] for r in results]).sum(0) for key in summed}
    tolerance = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 1e-2}[case.dtype]
    assert set(ours) == set(expected)
    for key in ("counts", "dropped"):
        assert torch.equal(ours[key], expected[key]), key
    for key in set(expected).difference(("counts", "dropped")):
        error = (ours[key] - expected[key]).double().norm() / expected[key].double().norm().clamp(min=1e-12)
        assert error <= tolerance, f"{key}: {error}"
    # Each case drops tokens or leaves experts idle as its name says.
    assert (expected["dropped"] > 0) == ("capacity_factor" in case.router and not case.expert_choice)
    for expert in case.closed:
        assert expected["counts"][expert] == 0
        assert expected["experts.down_proj"][expert].count_nonzero() == 0
    for expert in case.closed_on_first:
        assert results[0]["counts"][expert] == 0 < expected["counts"][expert]


class _Logged(dist.Work):
    """A collective whose `wait` is noted in `events`."""

    def __init__(self, work: dist.Work, events: list[str]) -> None:
        super().__init__()
        self._work, self._events = work, events

    def wait(self) -> None:  # type: ignore[override]
        self._events.append("wait")
        self._work.wait()


def _order_of_a_step(store: str, name: str) -> list[str]:
    import os

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(os.environ["RANK"]), world_size=2)
    events: list[str] = []
    real = dist.all_to_all_single

    def logged(received: Tensor, sent: Tensor, *arguments: Any, **keywords: Any) -> Any:
        work = real(received, sent, *arguments, **keywords)
        if not sent.is_floating_point():  # counts
            return work
        events.append("start")
        return _Logged(work, events)

    dist.all_to_all_single = logged
    try:
        case = CASES[name]
        layer = case.layer(dist.group.WORLD)
        for part, module in (("shared", layer.shared_experts), ("experts", layer.experts)):
            if module is not None:
                module.register_forward_hook(lambda *_, part=part: events.append(part))
                module.register_full_backward_hook(lambda *_, part=part: events.append(f"{part}, backward"))
        xs, grads = case.batch(2)
        _step(layer, xs[dist.get_rank()], grads[dist.get_rank()])
        return events
    finally:
        dist.all_to_all_single = real
        dist.destroy_process_group()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        (
            "shared experts",
            ["start", "shared", "wait", "experts", "start", "wait"],
            ["start", "wait", "experts, backward", "start", "shared, backward", "wait"],
        ),
        (
            "two chunks",
            ["start", "start", "wait", "experts", "start", "wait", "experts", "start", "wait", "wait"],
            ["start", "start", *["wait", "experts, backward", "start"] * 2, "wait", "wait"],
        ),
    ],
    ids=["shared experts", "two chunks"],
)
def test_what_is_computed_while_rows_travel(name: str, forward: list[str], backward: list[str], tmp_path: Path) -> None:
    """An exchange lies between a start and a wait, in both directions."""
    assert run_ranks(2, _order_of_a_step, str(tmp_path / "store"), name, timeout=90) == [[*forward, *backward]] * 2
