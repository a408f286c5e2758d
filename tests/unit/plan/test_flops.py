"""FLOPs of a token, compared with what torch counts while a model trains."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe.adapters.attach import attach, reset_magnitudes
from moe.config.compose import load_config
from moe.engine.parameters import freeze
from moe.model.build import build_model
from moe.plan import flops_per_token, visible_keys
from moe.plan.flops import PARTS, flops_by_part
from moe.sparse import balance_loss

LENGTH = 64
SMALL = [
    "model=tiny", "tokenizer.vocab_size=500", "model.vocab_size=500", "model.num_hidden_layers=2",
    "model.attention=naive", "model.sliding_window=null", f"train.sequence_length={LENGTH}", "experts.backend=loop",
]  # fmt: skip
LORA = ["adapter=lora", "init_from=unread", "adapter.r=8"]
ALL = [
    ["model.mlp=dense"],
    ["model.mlp=dense", "model.tie_word_embeddings=true"],
    ["model.mlp=sparse"],
    ["model.tie_word_embeddings=true"],
    ["model.n_shared_experts=1", "model.sparse_layers=every_2", "router.layers.1.top_k=3"],
]
SOME = [
    LORA,
    [*LORA, "model.mlp=dense", "adapter.target_modules=[q_proj,k_proj,v_proj,down_proj]"],
    [*LORA, "adapter.target_modules=['model.layers.1.*']", "adapter.rank_pattern={v_proj:3}"],
    [*LORA, "adapter.target_modules=[v_proj]", "adapter.modules_to_save=[embed_tokens,lm_head]"],
    [*LORA, "adapter.target_modules=[o_proj]", "adapter.modules_to_save=[model.layers.1.mlp.gate]"],
    [*LORA, "adapter.target_modules=[o_proj]", "optim.freeze=[*.lora.A]"],
    ["optim.freeze=[model.embed*,model.layers.0.*]"],
    ["optim.freeze=['model.*']"],
    ["optim.freeze=[model.embed*,'*norm*',*.self_attn.*,*.layers.0.mlp.*]", "model.n_shared_experts=1"],
]


BEHIND = {  # layers whose scores have a backward pass
    " ".join(SOME[2]): 1,
    " ".join(SOME[4]): 1,
    " ".join(SOME[5]): 1,
    " ".join(SOME[6]): 1,
    " ".join(SOME[7]): 0,
    " ".join(SOME[8]): 0,
}


def addmm_flops(total, left, right, *args, **kwargs):
    """FLOPs of the in-place operator, which torch's counter doesn't know."""
    return 2 * left[0] * left[1] * right[1]


def counted(config):
    """By torch, of one token in a training step."""
    model, ids = build_model(config, torch.device("cpu")), torch.randint(0, 500, (2, LENGTH))
    if config.adapter.trains_adapter:
        attach(model, config.adapter, 0)
        reset_magnitudes(model)
    freeze(model, config.optim)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        output = model(ids, labels_BS=ids)
        loss = output.lm_loss_sum
        if output.routers:
            loss = loss + balance_loss(output.routers)
        loss.backward()
    return counter.get_total_flops() / (2 * LENGTH)


@pytest.mark.parametrize("overrides", [*ALL, *SOME], ids=" ".join)
def test_flops_equal_torchs_count(overrides):
    """torch counts the products that ran; naive attention uses all S keys, of which (S + 1) / 2 are visible."""
    config = load_config([*SMALL, *overrides])
    parts = flops_by_part(config)
    unseen = LENGTH / visible_keys(LENGTH, None)
    scores = 4 * config.model.num_attention_heads * config.model.head_size * visible_keys(LENGTH, None)
    layers = config.model.num_hidden_layers
    behind = layers if overrides in ALL else BEHIND.get(" ".join(overrides), layers)
    more = scores * (layers + 2 * behind) * (unseen - 1)
    assert counted(config) == pytest.approx(flops_per_token(config) + more, rel=2e-3)
    assert parts.keys() == {*PARTS}


def test_all_in_closed_form_is_the_sum_over_the_weights():
    for overrides in ALL:
        config = load_config([*SMALL, *overrides])
        whole = flops_by_part(config)
        one_norm_frozen = flops_by_part(load_config([*SMALL, *overrides, "optim.freeze=[model.norm.weight]"]))
        for name, part in whole.items():
            assert (part.forward, part.backward) == pytest.approx(
                (one_norm_frozen[name].forward, one_norm_frozen[name].backward)
            )


def test_an_adapter_takes_two_thirds_of_the_arithmetic():
    big = ["model=mixtral_8x7b", "tokenizer=mistral", "train.sequence_length=4096"]
    whole, adapter = (flops_per_token(load_config([*big, *more])) for more in ([], LORA))
    assert 2 / 3 < adapter / whole < 0.7
