"""Profiled steps: each operation's time belongs to one part, forward and backward, and the training is the same."""

from collections import defaultdict

import pytest
import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from moe.config import Config
from moe.config.compose import load_config
from moe.distributed import rendezvous
from moe.engine.plain import PlainEngine
from moe.errors import UserError
from moe.model.build import build_model
from moe.train.profile import PARTS, PartRanges, PartTimes, in_part, table, times_by_part
from tests.ranks import run_ranks

OVERRIDES = [
    "model.vocab_size=300", "tokenizer.vocab_size=300", "model.num_hidden_layers=2", "model.hidden_size=32",
    "model.intermediate_size=64", "train.sequence_length=32", "engine=plain", "train.global_batch_size=8",
    "model.n_shared_experts=1",
]  # fmt: skip


def _trained(profiled: bool) -> tuple[list[torch.Tensor], PartTimes, float]:
    """The weights after two steps; the times of the second and its length by the profiler in ms."""
    config: Config = load_config(OVERRIDES)
    mesh = rendezvous.start(1)
    model = build_model(config, mesh.device)
    engine = PlainEngine(model, config, mesh)
    ids = torch.randint(0, 300, (8, 32), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        engine.backward(engine(ids, labels_BS=ids).lm_loss_sum)
        assert engine.step(1e-2) is not None

    step()
    if not profiled:
        step()
        return [parameter.detach() for parameter in model.parameters()], PartTimes(), 0.0
    ranges = PartRanges(engine)
    with profile(activities=[ProfilerActivity.CPU]) as recorded, in_part("other"):
        step()
    ranges.remove()
    assert not {"backward", "step"} & vars(engine).keys()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    events = recorded.events() or []
    whole = max(event.cpu_time_total for event in events if event.name == "moe: other") / 1e3
    return [parameter.detach() for parameter in model.parameters()], times_by_part(events), whole


def _both() -> tuple[bool, PartTimes, float]:
    weights, times, whole = _trained(profiled=True)
    alike = all(torch.equal(a, b) for a, b in zip(weights, _trained(profiled=False)[0], strict=True))
    return alike, times, whole


def test_every_operation_belongs_to_a_part_and_the_weights_stay_the_same() -> None:
    ((alike, times, whole),) = run_ranks(1, _both)
    assert alike
    one_rank = {part for part in PARTS if part not in ("exchange", "data wait")}
    assert {part for part, spent in times.host.items() if spent > 0} == one_rank
    assert sum(times.host.values()) == pytest.approx(whole, rel=0.05)  # beside the step there is next to nothing


class _Event:
    """What is read of torch.profiler's."""

    def __init__(
        self, name: str, parent: "_Event | None" = None, number: int = -1, host: float = 0.0, device: float = 0.0
    ) -> None:
        self.name, self.cpu_parent, self.sequence_nr = name, parent, number
        self.self_cpu_time_total, self.self_device_time_total = host, device  # microseconds
        self.device_type = DeviceType.CPU


def test_a_backward_node_belongs_to_the_part_that_made_it() -> None:
    node = "autograd::engine::evaluate_function: "
    step = _Event("moe: other", host=10)
    attention = _Event("moe: attention", step, host=1000)
    product = _Event("aten::mm", attention, number=7, host=2000, device=5000)
    experts = _Event("moe: experts", step)
    rows = _Event("_AllToAllStart", experts, number=8, host=300)
    gradients = _Event("moe: gradients", step, host=40)
    back = _Event(f"{node}MmBackward0", gradients, number=7, host=500)
    inner = _Event("aten::mm", back, host=4000, device=9000)
    back_rows = _Event(f"{node}_AllToAllEndBackward", gradients, number=8)
    sent = _Event("_AllToAllEndBackward", back_rows, host=600)
    leaf = _Event(f"{node}torch::autograd::AccumulateGrad", gradients, host=70)
    kernel = _Event("a kernel", device=9000)
    kernel.device_type = DeviceType.CUDA
    times = times_by_part(
        [step, attention, product, experts, rows, gradients, back, inner, back_rows, sent, leaf, kernel]
    )
    expected = {"other": 0.01, "attention": 7.5, "experts": 0.0, "exchange": 0.9, "gradients": 0.11}
    assert dict(times.host) == pytest.approx(expected)
    assert {part: spent for part, spent in times.device.items() if spent} == {"attention": 14.0}


def test_an_operation_that_makes_no_node_takes_none_from_the_next_part() -> None:
    node = "autograd::engine::evaluate_function: "
    step = _Event("moe: other")
    router, dispatch = _Event("moe: router", step), _Event("moe: dispatch", step)
    mean = _Event("aten::mean", router, number=3)  # of no gradient: it has the next node's number
    view = _Event("aten::view", dispatch, number=3)
    gradients = _Event("moe: gradients", step)
    back = _Event(f"{node}ViewBackward0", gradients, number=3)
    inner = _Event("ViewBackward0", back, number=3, host=1000)
    times = times_by_part([step, router, mean, dispatch, view, gradients, back, inner])
    assert times.host["dispatch"] == 1.0
    assert times.host["router"] == times.host["gradients"] == 0.0


def test_the_table_has_the_mean_over_the_ranks() -> None:
    first, second = defaultdict(float, attention=8.0, loss=8.0), defaultdict(float, attention=24.0)
    ranks = [PartTimes(first), PartTimes(second)]
    lines = table(ranks, 4, [{"step_seconds": 0.01, "mfu": 0.5, "data_wait": 0.25}])
    assert [line.split()[:3] for line in lines[1:3]] == [["attention", "4.00", "80.0%"], ["loss", "1.00", "20.0%"]]
    assert lines[-1] == "a profiled step: 10 ms, MFU 50.0%, data wait 25.0%"


def test_too_few_steps_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^profile=true needs train.steps ≥ 8, and train.steps=7: it profiles steps 5"):
        load_config(["profile=true", "train.steps=7"])
    assert load_config(["profile=true", "train.steps=8"]).profile
    assert load_config(["profile=true", "train.epochs=1"]).profile
