"""Counts, FLOPs and memory against what torch counts on real models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe.compose import load_config
from moe.model.transformer import Transformer
from moe.plan import count_parameters, estimate_memory, flops_per_token, visible_keys

SMALL = ["model=tiny", "tokenizer.vocab_size=500", "model.vocab_size=500", "model.num_hidden_layers=2"]


def compose(*words: str):
    return load_config([*SMALL, *words])


def build(config):
    model = Transformer(config.model, config.router, config.experts)
    model.init_weights(0)
    return model


@pytest.mark.parametrize("mlp", ["dense", "sparse"])
@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_counts_equal_the_model(mlp, tied, top_k):
    config = compose(f"model.mlp={mlp}", f"model.tie_word_embeddings={tied}", f"router.top_k={top_k}")
    model = build(config)
    total, active = count_parameters(config)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert total == sum(p.numel() for p in model.parameters())
    assert active == total - experts * (8 - top_k) // 8


@pytest.mark.parametrize(("length", "window"), [(1, None), (10, None), (10, 3), (10, 10), (10, 40), (7, 1)])
def test_visible_keys_are_counted(length, window):
    pairs = sum(1 for i in range(length) for j in range(i + 1) if window is None or i - j < window)
    assert visible_keys(length, window) == pytest.approx(pairs / length)


def addmm_flops(total, left, right, *args, **kwargs):
    """The in-place form, which torch's counter leaves out."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("mlp", ["dense", "sparse"])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_flops_equal_torchs_count(mlp, tied):
    """torch counts the products that ran. The naive attention computes all S keys where (S + 1) / 2 are visible."""
    length = 64
    config = compose(
        f"model.mlp={mlp}",
        f"model.tie_word_embeddings={tied}",
        "model.attention=naive",
        "model.sliding_window=null",
        f"train.sequence_length={length}",
        "experts=loop",
    )
    model, ids = build(config), torch.randint(0, 500, (2, length))
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        model(ids, labels_BS=ids).lm_loss_sum.backward()
    shapes = config.model
    width = shapes.num_attention_heads * shapes.head_size
    unseen = 12 * shapes.num_hidden_layers * width * (length - visible_keys(length, None))
    # the norms' backward passes hold small products that the formula leaves out
    assert counter.get_total_flops() / (2 * length) == pytest.approx(flops_per_token(config) + unseen, rel=1e-3)


@pytest.mark.parametrize("mlp", ["dense", "sparse"])
def test_activations_are_what_autograd_keeps(mlp):
    config = compose(f"model.mlp={mlp}", "train.sequence_length=128", "train.micro_batch_size=4")
    model = build(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(0, 500, (4, 128))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(ids, labels_BS=ids)
    assert output.lm_loss_sum is not None
    measured = sum(size for size, _ in kept.values())
    assert estimate_memory(config, 1)["activations"] == pytest.approx(measured, rel=0.1)


def test_memory_is_cut_over_the_ranks():
    words = ["train.precision=bfloat16", "train.micro_batch_size=2", "train.global_batch_size=16"]
    total, _ = count_parameters(compose())
    experts = 2 * 8 * 3 * 128 * 256
    one = estimate_memory(compose(*words), 1)
    assert (one["weights"], one["gradients"], one["optimizer"]) == (2 * total, 4 * total, 12 * total)
    stage1 = estimate_memory(compose(*words, "parallel.expert=4"), 8)
    local, cut = total - experts + experts // 4, (total - experts) / 8 + experts / 4 / 2
    assert (stage1["weights"], stage1["gradients"]) == (2 * local, 4 * local)
    assert stage1["optimizer"] == round(12 * cut)
    stage2 = estimate_memory(compose(*words, "parallel.expert=4", "parallel.zero_stage=2"), 8)
    assert stage2["gradients"] == round(4 * cut)
    assert stage2["activations"] == stage1["activations"]
