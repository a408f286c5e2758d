"""Exactness: the same global batch gives the same training at any (ranks, expert degree), and as plain PyTorch does.

One launch per world size runs all of its cases. Compared over 20 steps, in float32: the loss of every step, the
gradient norm before clipping, and after the last step the weights and both Adam moments (Adam hides a constant gradient
scale, the moments and the norm don't). `python -m tests.distributed.test_engine` prints docs/parallelism.md's table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch

from tests.distributed.training import Training, build, config_of, engine_steps, gathered, plain_steps
from tests.ranks import run_ranks

STEPS = 20
TOPOLOGIES = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]  # (ranks, expert-parallel degree)
ZERO_2, NO_CLIP = "parallel.zero_stage=2", "optim.max_grad_norm=1e9"
VARIANTS: dict[str, tuple[list[str], list[int]]] = {
    # name → (overrides, experts that the router passes over)
    "clipping": ([], []),
    "clipping, ZeRO-2": ([ZERO_2], []),
    "no clipping": ([NO_CLIP], []),
    "no clipping, ZeRO-2": ([NO_CLIP, ZERO_2], []),
    "capacity by position": (["router.capacity_factor=1.0"], []),
    "capacity by probability": (["router.capacity_factor=0.75", "router.drop_policy=probability"], []),
    "one expert idle everywhere": ([], [1]),
    "all experts of a rank idle": ([], [2, 3]),
    "experts idle on some ranks": (["router.num_experts=8", "router.top_k=1", "train.sequence_length=4"], []),
    "recompute mlp": (["model.recompute=mlp"], []),
    "recompute block, ZeRO-2": (["model.recompute=block", ZERO_2], []),
    "dropout": (["model.hidden_dropout=0.1", "model.recompute=mlp"], []),
    "router jitter": (["router.jitter_noise=0.1", "model.recompute=block"], []),
    "loop": (["experts.backend=loop"], []),
}


@dataclass(frozen=True)
class Differences:
    loss: float
    norm: float
    weights: float
    moments: float


def _all_cases(world_size: int) -> dict[tuple[int, str], Training]:
    """Runs on every rank: each variant at each degree of this world size."""
    results = {}
    for ranks, expert in TOPOLOGIES:
        if ranks != world_size:
            continue
        for name, (overrides, idle) in VARIANTS.items():
            config = config_of([*overrides, f"parallel.expert_parallel_size={expert}"])
            mesh, engine = build(config, idle)
            done = engine_steps(config, mesh, engine, 0, STEPS)
            done.state = engine.optimizer_state.gather()
            results[expert, name] = done
    return results


@cache
def launched(world_size: int) -> list[dict[tuple[int, str], Training]]:
    return run_ranks(world_size, _all_cases, world_size, timeout=240)


@cache
def reference(name: str) -> Training:
    overrides, idle = VARIANTS[name]
    return plain_steps(config_of(overrides), STEPS, idle)


def _largest(values: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(values, expected, strict=True))


def differences(ranks: int, expert: int, name: str) -> Differences:
    """Largest relative differences from plain PyTorch; of tensors, the norm of the difference over the norm."""
    results = [result[expert, name] for result in launched(ranks)]
    expected, errors = reference(name), {}
    for kind, tensors in gathered(results, expert).items():
        assert tensors.keys() == expected.state[kind].keys()
        errors[kind] = max(
            ((tensor - expected.state[kind][key]).norm() / expected.state[kind][key].norm().clamp(min=1e-20)).item()
            for key, tensor in tensors.items()
        )
    return Differences(
        loss=max(_largest(result.losses, expected.losses) for result in results),
        norm=max(_largest(result.norms, expected.norms) for result in results),
        weights=errors["weights"],
        moments=max(errors["exp_avg"], errors["exp_avg_sq"]),
    )


@pytest.mark.parametrize(("ranks", "expert"), TOPOLOGIES)
@pytest.mark.parametrize("name", VARIANTS)
def test_training_equals_plain_pytorch(ranks: int, expert: int, name: str) -> None:
    found = differences(ranks, expert, name)
    assert found.loss <= 1e-6
    assert found.norm <= 2e-6
    assert found.weights <= 5e-6
    assert found.moments <= 2e-5
    for result in launched(ranks):
        assert result[expert, name].counts == reference(name).counts, "the router chose otherwise"


def test_the_cases_are_what_they_say() -> None:
    clip = config_of([]).optim.max_grad_norm
    assert min(reference("clipping").norms) > clip, "clipping was not active"
    for name, idle in (("one expert idle everywhere", [1]), ("all experts of a rank idle", [2, 3])):
        counts = torch.tensor(reference(name).counts)
        assert (counts[:, :, idle] == 0).all()
        assert (counts.sum((0, 1)) > 0).sum() == 4 - len(idle)
    assert any(result[4, "experts idle on some ranks"].idle_here for result in launched(4))
    assert (torch.tensor(reference("experts idle on some ranks").counts).sum((0, 1)) > 0).all()


def test_another_seed_would_be_seen() -> None:
    """The bounds above can fail: one changed initial weight is a million times larger."""
    other = plain_steps(config_of(["train.seed=1"]), 2)
    assert _largest(other.losses, reference("clipping").losses[:2]) > 1e-4


def _offloaded() -> str:
    with pytest.raises(ValueError, match="parallel") as caught:
        build(config_of(["parallel.offload_optimizer=true"]))
    return str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can offload")
def test_offload_without_a_gpu_is_refused_with_the_reason() -> None:
    assert run_ranks(1, _offloaded)[0].startswith("parallel.offload_optimizer=true needs a CUDA device: on a CPU")


def _bfloat16(expert: int) -> Training:
    config = config_of(["train.precision=bfloat16", f"parallel.expert_parallel_size={expert}"])
    mesh, engine = build(config)
    done = engine_steps(config, mesh, engine, 0, STEPS)
    done.state = engine.optimizer_state.gather()
    return done


@pytest.mark.parametrize("expert", [1, 2])
def test_bfloat16_keeps_float32_masters_and_follows_float32(expert: int) -> None:
    results = run_ranks(2, _bfloat16, expert)
    assert results[0].losses == pytest.approx(reference("clipping").losses, rel=2e-2)
    weights = gathered(results, expert)["weights"]
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    gate = weights["model.layers.0.mlp.gate.weight"]
    assert not torch.equal(gate, gate.bfloat16().float()), "master weights carry only bfloat16's digits"


def main() -> None:
    torch.set_num_threads(1)
    print("| case | " + " | ".join(f"({ranks}, {expert})" for ranks, expert in TOPOLOGIES) + " |")
    print("| --- |" + " --- |" * len(TOPOLOGIES))
    for name in VARIANTS:
        cells = (differences(ranks, expert, name) for ranks, expert in TOPOLOGIES)
        print(f"| {name} | " + " | ".join(f"{d.loss:.0e} · {d.norm:.0e} · {d.weights:.0e}" for d in cells) + " |")


if __name__ == "__main__":
    main()
