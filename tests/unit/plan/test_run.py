"""`moe plan`: bytes per link compared with enumeration, advice that fits when used, presets, output, bad input."""

import json
import math
from pathlib import Path

import pytest
import yaml

from moe.config import PlanConfig, Recompute
from moe.config.compose import ConfigError, load_config
from moe.config.presets import choices, config_dir
from moe.errors import UserError
from moe.plan import exchange_bytes, flops_per_token, make_plan, plan_traffic
from moe.plan.flops import flops_by_part
from moe.plan.run import needed_gb
from moe.plan.show import run_plan, verdict
from moe.plan.trained import trained_shapes

MIXTRAL = [
    "model=mixtral_8x7b", "train.precision=bfloat16", "train.sequence_length=4096", "train.micro_batch_size=1",
    "train.global_batch_size=256",
]  # fmt: skip
TWO_H100_NODES = ["hardware=h100", "hardware.nodes=2"]


def compose(*overrides: str) -> PlanConfig:
    return load_config(list(overrides), "plan", PlanConfig)


def test_plan_takes_every_key_of_train():
    """Its defaults are train.yaml's, plus the hardware."""
    train, plan = (
        yaml.safe_load((config_dir() / f"{name}.yaml").read_text(encoding="utf-8")) for name in ("train", "plan")
    )
    kept = [entry for entry in plan["defaults"] if entry not in ("plan_schema", {"hardware": "cpu"})]
    assert kept == [entry for entry in train["defaults"] if entry != "train_schema"]
    assert plan["run_dir"] == train["run_dir"]


@pytest.mark.parametrize("name", [name for name in choices("hardware") if name != "custom"])
def test_hardware_presets_set_every_key(name):
    config = compose(f"hardware={name}", "train.micro_batch_size=1", "train.global_batch_size=64")
    hardware = config.hardware
    assert (hardware.name, hardware.nodes) == (name, 1)
    assert (hardware.device.name, hardware.gpus_per_node) == (("cpu", 1) if name == "cpu" else ("cuda", 8))
    assert compose(f"hardware={name}", "hardware.nodes=2", "train.global_batch_size=64").hardware.nodes == 2


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("a100_8x1", "hardware=a100"),
        ("h100_8x8", "hardware=h100 hardware.nodes=8"),
        ("h200_1x1", "hardware=h200 hardware.gpus_per_node=1 hardware.host_memory_gb=256"),
        ("cpu_1x1", "hardware=cpu"),
        ("cpu_2x1", "hardware=cpu hardware.gpus_per_node=2"),
    ],
)
def test_a_removed_preset_is_an_error_that_says_what_to_write(before, now):
    with pytest.raises(ConfigError, match=f"^hardware={before}: write {now}$"):
        compose(f"hardware={before}")
    hardware = compose(*now.split(), "train.micro_batch_size=1", "train.global_batch_size=64").hardware
    per_node, nodes = before.partition("_")[2].split("x")
    assert hardware.world_size == int(per_node) * int(nodes)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["hardware=abacus"],
            r"hardware=abacus must be one of a100, cpu, custom, h100, h200; or describe yours: hardware=custom",
        ),
        (["hardware=custom"], r"hardware\.gpus_per_node, .*hardware\.memory_gb, .* must be stated"),
        (["hardware.memory_gb=0"], r"hardware\.memory_gb=0.* must be > 0"),
        (["hardware.reserved_gb=9"], r"hardware\.reserved_gb=9.* must be < hardware\.memory_gb=8"),
        (["hardware.link_efficiency=0"], r"hardware\.link_efficiency=0.* must be > 0"),
        (["hardware.link_efficiency=1.1"], r"hardware\.link_efficiency=1\.1 must be ≤ 1"),
        (["hardware.exchange_latency_us=-1"], r"hardware\.exchange_latency_us=-1.* must be ≥ 0"),
        (["plan.imbalance=0.9"], r"plan\.imbalance=0\.9 must be ≥ 1"),
        (
            [*MIXTRAL, *TWO_H100_NODES, "router.num_experts=16", "parallel.expert_parallel_size=16"],
            "expert_across_nodes=true",
        ),
        (
            ["parallel.offload_optimizer=true"],
            r"offload_optimizer=true must be false on hardware\.device=cpu",
        ),
    ],
)
def test_bad_input_is_one_line(overrides, text):
    with pytest.raises(ValueError, match=text) as caught:
        make_plan(compose(*overrides))
    assert "\n" not in str(caught.value)


def test_exchange_is_the_sum_over_layers_and_passes():
    """For every layer and micro-batch, each choice's row and its gradient go to the expert and back; counts only go in
    the forward pass."""
    config = compose(*MIXTRAL, *TWO_H100_NODES, "parallel.expert_parallel_size=8")
    rows = 0
    for _ in range(256 // 16):  # micro-batches of a rank
        for _ in range(32):  # layers
            for _ in ("to the experts", "back", "gradients to the experts", "gradients back"):
                rows += 4096 * 2 * 4096 * 2
    sent = exchange_bytes(config, 16)
    assert (sent.rows, sent.counts, sent.leaving) == (rows, 16 * 32 * 8 * 8, 7 / 8)
    again = exchange_bytes(
        compose(*MIXTRAL, *TWO_H100_NODES, "parallel.expert_parallel_size=8", "model.recompute=mlp"), 16
    )
    assert (again.rows, again.counts) == (rows * 6 // 4, 2 * sent.counts)  # the forward exchanges, and their counts
    counted = compose(*MIXTRAL, *TWO_H100_NODES, "parallel.expert_parallel_size=8", "router.global_aux_loss_coef=0.01")
    assert exchange_bytes(counted, 16) == again  # a forward pass more, as with recomputation
    assert make_plan(counted).times.compute > make_plan(config).times.compute * 1.3
    assert exchange_bytes(compose(*MIXTRAL, *TWO_H100_NODES), 16).total == 0


@pytest.mark.parametrize(("nodes", "ranks", "expert"), [(1, 4, 2), (2, 8, 8), (2, 8, 4), (4, 4, 2), (2, 4, 8)])
def test_links_are_those_of_the_groups(nodes, ranks, expert):
    """Compared with enumerating every rank's peers and rings."""
    world = nodes * ranks
    config = compose(
        "hardware=h100", f"hardware.nodes={nodes}", f"hardware.gpus_per_node={ranks}",
        f"parallel.expert_parallel_size={expert}",
        "parallel.expert_across_nodes=true", "train.micro_batch_size=2", "train.global_batch_size=64",
    )  # fmt: skip
    flows, sent = plan_traffic(config, nodes, ranks), exchange_bytes(config, world)
    near = far = 0.0
    for rank in range(world):
        for peer in range(rank // expert * expert, rank // expert * expert + expert):
            if peer == rank:
                continue
            if peer // ranks == rank // ranks:
                near += sent.total / expert / world
            else:
                far += sent.total / expert / world
    assert (flows["expert exchange"].intra, flows["expert exchange"].inter) == pytest.approx((near, far))
    local = 4 * 3 * 128 * 256 * 8 // expert
    replicas = world // expert
    if replicas > 1:
        hops = [(rank, (rank + expert) % world) for rank in range(0, world, expert)]
        crossing = sum(a // ranks != b // ranks for a, b in hops) / replicas
        flow = flows["expert gradients"]
        total = 2 * (replicas - 1) / replicas * 4 * local
        assert (flow.total, flow.inter) == pytest.approx((total, total * crossing))
    else:
        assert flows["expert gradients"].total == 0


def test_only_what_trains_is_reduced_and_updated():
    whole = ["init_from=base", "model.sliding_window=null", "hardware=h100", "train.global_batch_size=64"]
    adapter = compose(*whole, "adapter=lora", "adapter.target_modules=[q_proj,v_proj]")
    trained = sum(math.prod(shape) for shape in trained_shapes(adapter).values())
    flows = plan_traffic(adapter, 1, 8)
    assert flows["shared gradients"].total == pytest.approx(7 / 8 * 8 * trained)
    assert flows["shared weights"].total == pytest.approx(7 / 8 * 4 * trained)
    assert "expert gradients" not in flows
    assert make_plan(adapter).times.update < make_plan(compose(*whole)).times.update / 20


def test_float8_products_count_half():
    given = [*MIXTRAL, "hardware=h100"]
    plain, rounded = (make_plan(compose(*given, f"experts.fp8={fp8}")) for fp8 in ("false", "true"))
    experts = flops_by_part(compose(*given))["experts"].total / flops_per_token(compose(*given))
    assert rounded.times.compute / plain.times.compute == pytest.approx(1 - experts / 3, rel=1e-6)


def test_the_largest_cluster_is_planned():
    overrides = [
        "hardware=h100", "hardware.nodes=16384", "router.num_experts=131072", "parallel.expert_parallel_size=131072",
        "parallel.expert_across_nodes=true", "train.micro_batch_size=1",
    ]  # fmt: skip
    assert make_plan(compose(*overrides)).traffic["expert exchange"].inter > 0
    with pytest.raises(ConfigError, match=r"hardware\.nodes=16385 × hardware\.gpus_per_node=8 must be ≤ 131072 ranks"):
        compose("hardware=h100", "hardware.nodes=16385")


def test_stage_2_reduces_after_every_micro_batch():
    overrides = [*MIXTRAL, *TWO_H100_NODES, "parallel.expert_parallel_size=8"]
    one, two = (make_plan(compose(*overrides, f"parallel.zero_stage={stage}")).traffic for stage in (1, 2))
    assert two["shared gradients"].total == 16 * one["shared gradients"].total
    assert two["shared weights"] == one["shared weights"]


def test_times_are_work_over_rates():
    config = compose(*MIXTRAL, *TWO_H100_NODES, "parallel.expert_parallel_size=8", "plan.imbalance=1")
    plan = make_plan(config)
    assert plan.times.compute == pytest.approx(256 * 4096 / 16 * flops_per_token(config) / 989e12)
    assert plan.times.inter == pytest.approx(sum(flow.inter for flow in plan.traffic.values()) / 50e9)
    assert plan.times.overlapped < plan.times.in_turn
    full = make_plan(compose(*MIXTRAL, *TWO_H100_NODES, "parallel.expert_parallel_size=8", "plan.imbalance=1.5"))
    again = make_plan(compose(*MIXTRAL, *TWO_H100_NODES, "model.recompute=block"))
    assert full.times.compute > 1.2 * plan.times.compute
    assert 1.3 < again.times.compute / plan.times.compute < 4 / 3


def test_the_exchange_is_a_range_by_hand():
    """Of 16 micro-batches and 32 layers: each row of bfloat16 four times, of which 7 in 8 leave the rank, at 450 GB/s;
    or at 0.6 of that, on the rank with 1.5 × the mean's rows, and 50 µs for each of five calls."""
    plan = make_plan(compose(*MIXTRAL, *TWO_H100_NODES, "parallel.expert_parallel_size=8"))
    micro_layers = 16 * 32
    sent = micro_layers * (4 * 4096 * 2 * 4096 * 2 + 8 * 8) * 7 / 8
    fast, slow = plan.times, plan.slow_times
    assert fast.exchange == pytest.approx(sent / 450e9)
    assert slow.exchange == pytest.approx(1.5 * sent / (0.6 * 450e9) + micro_layers * 5 * 50e-6)
    assert slow.intra - slow.exchange == pytest.approx((fast.intra - fast.exchange) / 0.6)
    assert slow.inter == pytest.approx(fast.inter / 0.6)
    assert (slow.compute, slow.update) == (fast.compute, fast.update)
    assert fast.in_turn < slow.in_turn


def test_an_exchange_between_nodes_waits_for_the_slower_link():
    split = ["router.num_experts=16", "parallel.expert_parallel_size=16", "parallel.expert_across_nodes=true"]
    stated = ["hardware.link_efficiency=0.5", "hardware.exchange_latency_us=20", "plan.imbalance=1"]
    plan = make_plan(compose(*MIXTRAL, *TWO_H100_NODES, *split, *stated))
    micro_layers = 16 * 32
    passed = micro_layers * (4 * 4096 * 2 * 4096 * 2 + 16 * 8)
    assert plan.times.exchange == pytest.approx(passed * 8 / 16 / 50e9)  # 7 in 16 go to ranks of the own node
    waits = micro_layers * 5 * 20e-6
    assert plan.slow_times.exchange == pytest.approx(2 * plan.times.exchange + waits)
    assert plan.slow_times.inter == pytest.approx(2 * plan.times.inter + waits)
    assert plan.slow_times.intra == pytest.approx(2 * plan.times.intra)


def test_one_rank_has_no_range():
    plan = make_plan(compose("hardware=cpu"))
    assert plan.slow_times == plan.times
    assert plan.times.exchange == 0


@pytest.mark.parametrize(
    "overrides",
    [
        [*MIXTRAL, *TWO_H100_NODES],
        [*MIXTRAL, *TWO_H100_NODES, "parallel.expert_parallel_size=8"],
        [*MIXTRAL, "hardware=a100"],
        [
            "model=small",
            "hardware=cpu",
            "hardware.gpus_per_node=2",
            "hardware.memory_gb=3",
            "train.sequence_length=4096",
        ],
        ["model=mistral_7b", "hardware=h100", "train.sequence_length=8192", "train.global_batch_size=64"],
    ],
)
def test_advice_fits_when_it_is_typed(overrides):
    plan = make_plan(compose(*overrides))
    assert not plan.fits
    assert plan.advice, verdict(plan)
    advised = make_plan(compose(*overrides, *plan.advice))
    assert advised.fits
    assert advised.needed_gb == pytest.approx(plan.advised_gb)
    assert all(override in verdict(plan) for override in plan.advice)
    for left_out in plan.advice:  # and every part of it is needed
        rest = [override for override in plan.advice if override != left_out]
        try:
            fewer = make_plan(compose(*overrides, *rest))
        except ConfigError:
            continue
        assert not fewer.fits, f"{left_out} is not needed"


def test_what_recomputing_costs_is_planned_beside_what_it_saves(capsys):
    """Forward FLOPs of experts and router, and for whole blocks of attention too, once more."""
    config = compose("model=small", "hardware=cpu")
    plan, parts = make_plan(config), flops_by_part(config)
    tokens = config.train.micro_batch_size * config.train.sequence_length
    mlp = tokens * (parts["experts"].forward + parts["router"].forward)
    block = mlp + tokens * parts["attention"].forward
    assert plan.recomputed_flops == pytest.approx({Recompute.none: 0, Recompute.mlp: mlp, Recompute.block: block})
    saved = {kind: plan.recomputing[Recompute.none] - size for kind, size in plan.recomputing.items()}
    run_plan(config)
    assert f"({1e6 * saved[Recompute.mlp] / mlp:,.0f} bytes saved per MFLOP)" in " ".join(
        capsys.readouterr().out.split()
    )
    assert plan.as_dict()["memory_bytes_per_rank"]["flops_by_recompute"]["none"] == 0


def test_two_batch_overlap_is_planned_without_the_recomputation_that_it_lacks():
    overrides = ["model=small", "hardware=cpu", "hardware.gpus_per_node=2", "train.sequence_length=4096"]
    overrides += ["parallel.expert_parallel_size=2", "experts.two_batch_overlap=true", "train.micro_batch_size=4"]
    plan = make_plan(compose(*overrides, "hardware.memory_gb=64"))
    assert plan.recomputing.keys() == {Recompute.none, Recompute.block}
    assert not make_plan(compose(*overrides, "hardware.memory_gb=3")).fits


def test_a_batch_that_the_ranks_can_not_share_is_rounded_up_with_a_note():
    overrides = ["model=mixtral_8x7b", *TWO_H100_NODES, "parallel.expert_parallel_size=8"]
    plan = make_plan(compose(*overrides))
    assert plan.config.train.global_batch_size == 128
    assert "train.global_batch_size=16 can't be cut into micro-batches of 8 on 16 ranks: planned with 128" in plan.note
    assert make_plan(compose(*overrides, "train.global_batch_size=128")).memory == plan.memory
    assert make_plan(compose(*overrides, *plan.advice)).fits
    assert make_plan(compose(*overrides, "train.global_batch_size=128")).note == ""


def test_the_plan_says_when_nothing_fits():
    plan = make_plan(
        compose(*MIXTRAL, "model.num_hidden_layers=3000", "hardware=h100", "parallel.expert_parallel_size=8")
    )
    assert not plan.fits
    assert plan.advice == []
    assert "no expert_parallel_size, micro-batch" in verdict(plan)


def test_json_is_the_plan(capsys):
    config = compose(*MIXTRAL, *TWO_H100_NODES, "parallel.expert_parallel_size=8", "plan.json=true")
    plan = make_plan(config)
    with pytest.raises(UserError) as caught:
        run_plan(config)
    assert str(caught.value) == verdict(plan)
    shown = json.loads(capsys.readouterr().out)
    memory = shown["memory_bytes_per_rank"]
    assert memory["peak"] == sum(memory["phases"][memory["peak_phase"]].values()) == plan.memory.peak
    assert shown["parameters"] == {"total": 46_702_792_704, "active": 12_879_925_248, "per_rank": 7_242_780_672}
    assert shown["needed_gb"] == needed_gb(config, plan.memory)
    assert shown["fits"] is False
    assert shown["advice"]
    fast, slow = shown["seconds_per_step"], shown["seconds_per_step_slow_links"]
    assert fast["at_best"] <= fast["nothing_overlaps"] < slow["nothing_overlaps"]
    assert fast["exchange"] < slow["exchange"]
    assert shown["exchange_calls_per_step"] == 16 * 32 * 5


def test_table_names_everything(capsys):
    with pytest.raises(UserError, match=r"^does not fit: needs .* try "):
        run_plan(compose(*MIXTRAL, *TWO_H100_NODES, "parallel.expert_parallel_size=8", "plan.imbalance=2"))
    shown = capsys.readouterr().out
    for part in (
        "2 × 8 GPUs of 80 GB", "46,702,792,704, 12,879,925,248 active", "fullest expert rank at 2 × the mean",
        "MoE buffers", "← peak", "model.recompute = none", "expert exchange", "between nodes", "nothing overlaps",
        "ranges: links at their stated rates, to links at 0.6 of them, 50 µs for each of 2,560 all-to-alls,",
    ):  # fmt: skip
        assert part in shown, part
    assert all(len(line) <= 110 for line in shown.splitlines())
    run_plan(compose("hardware=cpu"))
    assert capsys.readouterr().out.splitlines()[-1].startswith("fits: needs ")


def test_the_page_shows_the_commands_output(capsys):
    """The command prints the output shown in docs/plan.md."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "plan.md").read_text(encoding="utf-8")
    with pytest.raises(UserError) as caught:
        run_plan(compose(*MIXTRAL, *TWO_H100_NODES, "parallel.expert_parallel_size=8"))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    lines.append(f"moe: {caught.value}")
    missing = [line for line in lines if line not in page]
    assert not missing, missing
