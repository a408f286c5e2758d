"""Parameters, FLOPs and memory, compared with what torch counts on real models."""

import pytest
import torch

from moe.adapters.attach import attach
from moe.checkpoint.ownership import FILE_BYTES
from moe.config.compose import load_config
from moe.model.transformer import Transformer
from moe.plan import count_parameters, estimate_memory, plan_memory, visible_keys
from moe.plan.activations import Shapes, head_memory, kept_by_layers, layer_backward
from moe.plan.memory import CHECKPOINT_FILE

SMALL = ["model=tiny", "tokenizer.vocab_size=500", "model.vocab_size=500", "model.num_hidden_layers=2"]


def compose(*overrides: str):
    return load_config([*SMALL, *overrides])


def build(config):
    model = Transformer(config.model, config.router, config.experts)
    model.init_weights(0)
    return model


@pytest.mark.parametrize("mlp", ["dense", "sparse"])
@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_counts_equal_the_model(mlp, tied, top_k):
    chosen = [f"router.top_k={top_k}", "router.norm_topk_prob=false"]
    config = compose(f"model.mlp={mlp}", f"model.tie_word_embeddings={tied}", *chosen)
    model = build(config)
    total, active = count_parameters(config)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert total == sum(p.numel() for p in model.parameters())
    assert active == total - experts * (8 - top_k) // 8


@pytest.mark.parametrize(
    ("overrides", "active"),  # of 8 experts, those that a token uses in all layers together
    [
        (["model.n_shared_experts=2", "model.moe_intermediate_size=40"], 4),
        (["model.sparse_layers=every_2"], 2),
        (["model.sparse_layers=[0]", "model.n_shared_experts=1", "router.top_k=3"], 3),
        (["router=noisy_topk"], 4),
        (["router=group_limited", "router.bias_update=sign"], 4),
        (["router=expert_choice", "router.capacity_factor=3.0"], 6),
        (["router.layers.1.top_k=5"], 7),
        (["router.schedules.top_k={0:4,10:2}"], 8),
        (["model.qk_norm=projection", "model.head_dim=24"], 4),
        (["model.qk_norm=head"], 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_counts_equal_the_model_of_every_shape(overrides, active):
    config = compose(*overrides)
    model = build(config)
    total, counted = count_parameters(config)
    per_expert = 3 * config.model.hidden_size * config.model.expert_size
    routed = len(config.model.sparse_layer_numbers) * 8 * per_expert
    assert total == sum(p.numel() for p in model.parameters())
    assert routed == sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    assert counted == total - routed + active * per_expert


@pytest.mark.parametrize(("length", "window"), [(1, None), (10, None), (10, 3), (10, 10), (10, 40), (7, 1)])
def test_visible_keys_are_counted(length, window):
    pairs = sum(1 for i in range(length) for j in range(i + 1) if window is None or i - j < window)
    assert visible_keys(length, window) == pytest.approx(pairs / length)


LORA = ["train.sequence_length=320", "model.sliding_window=null", "adapter=lora", "init_from=base"]
ONE = ["train.micro_batch_size=1", "train.global_batch_size=1"]
KEPT = [  # what decides which tensors are kept
    ["model.mlp=dense", "train.sequence_length=64", "model.sliding_window=null"],
    ["train.sequence_length=64", "model.sliding_window=null"],
    ["train.sequence_length=320", "model.sliding_window=null"],
    ["train.sequence_length=640", "model.sliding_window=null"],
    ["train.sequence_length=1024", "model.sliding_window=null", "model.num_key_value_heads=1", *ONE],
    ["train.sequence_length=1025", "model.sliding_window=null", "model.num_key_value_heads=1", *ONE],
    ["train.sequence_length=256", "model.sliding_window=96"],
    ["train.sequence_length=128", "router.top_k=1", "router.norm_topk_prob=false", "router.num_experts=4"],
    ["train.sequence_length=128", "experts.backend=loop"],
    ["train.sequence_length=128", "experts.fp8=true"],
    ["train.sequence_length=320", "model.sliding_window=null", "model.qk_norm=head"],
    ["train.sequence_length=320", "model.sliding_window=null", "model.qk_norm=projection", "model.mlp=dense"],
    ["train.sequence_length=256", "model.sliding_window=96", "model.qk_norm=head"],
    [*LORA, "adapter.target_modules=[q_proj,k_proj,v_proj,o_proj]"],
    [*LORA, "adapter.rank_pattern={experts:30}"],
    [*LORA, "experts.backend=loop"],
]


@pytest.mark.parametrize("overrides", KEPT, ids=" ".join)
def test_activations_are_what_autograd_keeps(overrides):
    config = compose("train.micro_batch_size=4", "train.global_batch_size=4", *overrides)
    model = build(config)
    if config.adapter.trains_adapter:
        attach(model, config.adapter, 0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(0, 500, (config.train.micro_batch_size, config.train.sequence_length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(ids, labels_BS=ids)
    assert output.lm_loss_sum is not None
    measured = sum(size for size, _ in kept.values())
    shapes = Shapes(config, "cpu", 1.0)
    planned = head_memory(shapes)[0] + sum(block.size for block in kept_by_layers(shapes, 2))
    assert planned == pytest.approx(measured, rel=0.05)


def kinds(config, world, phase, **keywords):
    return plan_memory(config, world, **keywords).phases[phase]


LOCAL = ["train.micro_batch_size=2", "train.global_batch_size=16"]


def sizes(config, expert, world):
    """(elements on a rank, of its part of ZeRO's partition)"""
    total, _ = count_parameters(config)
    experts = 2 * 8 * 3 * 128 * 256
    local = total - experts + experts // expert
    return local, (total - experts) / world + experts / world


@pytest.mark.parametrize(("expert", "world"), [(1, 1), (1, 8), (4, 8), (8, 8)])
def test_float32_on_a_cpu_shares_the_optimizers_weights_with_the_model(expert, world):
    config = compose(*LOCAL, f"parallel.expert_parallel_size={expert}")
    local, share = sizes(config, expert, world)
    update = kinds(config, world, "update", device="cpu")
    assert (update["weights"], update["optimizer"]) == (4 * local, round(8 * share))
    if expert == 1:  # reduced in place
        assert update["gradients"] == kinds(config, world, "backward", device="cpu")["gradients"] == 4 * local
        assert kinds(config, world, "reduce", device="cpu")["communication"] == 0
    else:
        assert 4 * share <= update["gradients"] < 4 * local + 1


@pytest.mark.parametrize(("expert", "world"), [(1, 1), (1, 8), (8, 8)])
def test_float32_on_cuda_has_weights_of_the_optimizers_own(expert, world):
    """Unpatched DeepSpeed: the update needs master weights, moments, a partition of gradients and a copy of it."""
    config = compose(*LOCAL, f"parallel.expert_parallel_size={expert}")
    local, share = sizes(config, expert, world)
    update = kinds(config, world, "update", device="cuda")
    assert (update["weights"], update["optimizer"]) == (4 * local, round(12 * share))
    assert update["gradients"] >= 4 * share
    assert update["working"] >= 4 * share
    assert kinds(config, world, "reduce", device="cuda")["communication"] > 4 * 500_000_000


@pytest.mark.parametrize("stage", [1, 2])
def test_bfloat16_has_float32_masters_and_sums(stage):
    config = compose(
        *LOCAL, "train.precision=bfloat16", "parallel.expert_parallel_size=4", f"parallel.zero_stage={stage}"
    )
    local, share = sizes(config, 4, 8)
    update = kinds(config, 8, "update", device="cuda")
    assert (update["weights"], update["optimizer"]) == (2 * local, round(12 * share))
    assert update["gradients"] == (4 * local if stage == 1 else round(4 * share))
    bucket = kinds(config, 8, "loss", device="cuda")["communication"]
    assert bucket == (0 if stage == 1 else 2 * 500_000_000)  # whole from the first gradient on, on CUDA


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_on_a_cpu_float32_sums_exist_from_the_first_gradient_to_the_update(micro_batches):
    config = compose(
        "train.precision=bfloat16", "train.micro_batch_size=2", f"train.global_batch_size={2 * micro_batches}"
    )
    local, _ = sizes(config, 1, 1)
    loss, backward, update, evaluate = (
        kinds(config, 1, phase)["gradients"] for phase in ("loss", "backward", "update", "evaluate")
    )
    assert (update, evaluate) == (4 * local, 0)
    assert 4 * local < backward < 5 * local
    assert (0 < loss < 4 * local) if micro_batches == 1 else (loss == 4 * local)
    assert {kinds(config, 1, phase, device="cuda")["gradients"] for phase in ("loss", "evaluate")} == {4 * local}


def test_offload_moves_the_optimizer_to_the_host():
    overrides = [*LOCAL, "train.precision=bfloat16", "parallel.expert_parallel_size=4"]
    config = compose(*overrides, "parallel.offload_optimizer=true")
    plan = plan_memory(config, 8, device="cuda")
    assert all(phase["optimizer"] == 0 for phase in plan.phases.values())
    assert plan.host == pytest.approx(18 * sizes(config, 4, 8)[1], abs=1)
    assert plan_memory(compose(*overrides), 8, device="cuda").host == 0


def test_recomputation_keeps_less_and_imbalance_needs_more():
    overrides = ["train.micro_batch_size=8", "train.global_batch_size=32", "train.sequence_length=256"]

    def rows(recompute, expert=1, imbalance=1.0):
        config = compose(*overrides, f"model.recompute={recompute}", f"parallel.expert_parallel_size={expert}")
        phase = kinds(config, 4, "loss", imbalance=imbalance)
        return phase["activations"] + phase["moe_buffers"], phase["moe_buffers"]

    assert rows("none")[0] > 1.8 * rows("mlp")[0] > 1.8 * rows("block")[0]
    assert rows("mlp")[1] == rows("block")[1] == 0
    assert rows("none", imbalance=1.5) == rows("none")  # one rank holds all experts: it gets all rows, always
    assert rows("none", 2, 1.5)[1] > 1.3 * rows("none", 2)[1]
    assert rows("none", 2, 9.0) == rows("none", 2, 2.0)  # no rank gets more than all rows


def test_estimate_is_the_fullest_phase_of_a_step():
    config = compose(*LOCAL)
    plan = plan_memory(config, 8)
    assert sum(estimate_memory(config, 8).values()) == plan.step_peak
    assert plan.step_peak == max(plan.total(phase) for phase in ("loss", "backward", "reduce", "update"))
    assert plan.peak >= plan.step_peak


def test_a_checkpoint_takes_its_share_of_host_memory_beside_a_step():
    overrides = ["model=small", "train.global_batch_size=32", "train.micro_batch_size=1"]
    total, _ = count_parameters(load_config(overrides))
    for world in (1, 4):
        plan = plan_memory(load_config(overrides), world, device="cuda")
        assert plan.checkpoint_host == pytest.approx(2 * 12 * total / world, rel=1e-3)
    beside, alone = (
        plan_memory(load_config([*overrides, f"checkpoint.background={background}"]), 2).total("checkpoint")
        for background in ("true", "false")
    )
    assert beside > alone
    assert CHECKPOINT_FILE == FILE_BYTES


def test_chunks_of_an_exchange_add_gradients_of_a_layers_experts_up():
    def working(*overrides):
        config = load_config(["model=small", "train.sequence_length=4096", *overrides])
        return {block.kind: block.size for block in layer_backward(Shapes(config, "cpu", 1.0))}["working"]

    config = load_config(["model=small"]).model
    weights = 3 * 4 * config.expert_size * config.hidden_size * 4  # of the four experts of a rank, float32
    parallel = "parallel.expert_parallel_size=2"
    assert working(parallel, "experts.exchange_chunks=2") - working(parallel) == weights
    assert working(parallel, "experts.two_batch_overlap=true", "train.micro_batch_size=2") == pytest.approx(
        working(parallel, "experts.exchange_chunks=2", "train.micro_batch_size=2")
    )
    assert working("experts.exchange_chunks=2") == working()
