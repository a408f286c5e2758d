"""The whole model: equal to transformers' with the same weights; documents, initial weights, meta device, cache."""

import pytest
import torch
import torch.nn.functional as F

from moe.config import AttentionBackend, ExpertsConfig, Initializer, Mlp, ModelConfig, TopKRouterConfig
from moe.model.cache import KVCache
from moe.model.transformer import Transformer

VOCAB = 99


def build(mlp: Mlp = Mlp.sparse, seed: int = 0, **settings) -> Transformer:
    config = ModelConfig(
        mlp=mlp, vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, **settings
    )
    model = Transformer(config, TopKRouterConfig(), ExpertsConfig())
    model.init_weights(seed)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def peer(model: Transformer):
    """transformers' model of the same shape, loaded with our unchanged state dict."""
    transformers = pytest.importorskip("transformers")
    config, dense = model.config, model.config.mlp is Mlp.dense
    settings = {
        name: getattr(config, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "rope_theta",
            "rms_norm_eps",
            "sliding_window",
            "tie_word_embeddings",
        )
    }
    kind = (transformers.MistralConfig, transformers.MistralForCausalLM)
    if not dense:
        kind = (transformers.MixtralConfig, transformers.MixtralForCausalLM)
    other = kind[1](kind[0](**settings, attn_implementation="eager"))
    other.load_state_dict(model.state_dict())  # strict: every name, every shape
    return other


@pytest.mark.parametrize("mlp", list(Mlp))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sliding_window": 7},
        {"num_key_value_heads": 1, "rope_theta": 1e6},
        {"num_key_value_heads": 4, "head_dim": 24},
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    ],
    ids=["plain", "window", "mqa", "mha_wide_heads", "tied"],
)
def test_equals_transformers(mlp, settings):
    model = build(mlp, **settings)
    other = peer(model)
    ids, labels = tokens(2, 50), tokens(2, 50, seed=1)
    labels[0, :9] = -100
    expected = other(ids).logits
    torch.testing.assert_close(model(ids).logits_BSV, expected, rtol=0, atol=1e-5)
    output = model(ids, labels_BS=labels)
    loss = F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(output.lm_loss_sum, loss, rtol=1e-6, atol=0)
    tokens_scored = (labels != -100).sum()
    (output.lm_loss_sum / tokens_scored).backward()
    (loss / tokens_scored).backward()
    gradients = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=0, atol=1e-6, msg=name)
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("mlp", list(Mlp))
@pytest.mark.parametrize("window", [None, 1, 6, 40, 64])
def test_block_equals_naive_through_the_model(mlp, window):
    ids = tokens(2, 40)
    documents = torch.tensor([[0] * 11 + [1] * 29, [0] * 40])
    outcomes = []
    for backend in (AttentionBackend.naive, AttentionBackend.block):
        model = build(mlp, sliding_window=window, attention=backend).double()
        loss = model(ids, document_ids_BS=documents, labels_BS=ids).lm_loss_sum
        loss.backward()
        outcomes.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for naive, block in zip(*outcomes, strict=True):
        torch.testing.assert_close(block, naive, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mlp", list(Mlp))
@pytest.mark.parametrize("window", [None, 8])
def test_a_document_does_not_see_another(mlp, window):
    """Changing tokens of document 0 changes neither document 1's logits nor its loss's gradient at its inputs."""
    model = build(mlp, sliding_window=window).double()
    ids = tokens(1, 48)
    changed = ids.clone()
    changed[:, :20] = tokens(1, 20, seed=7)
    documents = torch.tensor([[0] * 20 + [1] * 28])
    labels = tokens(1, 48, seed=2)
    labels[:, :20] = -100
    seen = []
    for inputs in (ids, changed):
        inputs_grad = {}
        handle = model.model.embed_tokens.register_forward_hook(
            lambda module, args, out, store=inputs_grad: store.update(x=out) or out.retain_grad()
        )
        logits = model(inputs, document_ids_BS=documents).logits_BSV[:, 20:]
        model(inputs, document_ids_BS=documents, labels_BS=labels).lm_loss_sum.backward()
        handle.remove()
        seen.append((logits.detach(), inputs_grad["x"].grad))
        assert inputs_grad["x"].grad[:, :20].abs().max() == 0
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=0, atol=1e-12)
    torch.testing.assert_close(seen[0][1][:, 20:], seen[1][1][:, 20:], rtol=0, atol=1e-12)
    whole = [model(inputs).logits_BSV[:, 20:] for inputs in (ids, changed)]  # without ids they do see them
    assert window is not None or (whole[0] - whole[1]).abs().min() > 0


def test_packed_documents_equal_documents_alone():
    model = build(sliding_window=5).double()
    ids = tokens(1, 30)
    packed = model(ids, document_ids_BS=torch.tensor([[0] * 12 + [1] * 18])).logits_BSV
    alone = torch.cat([model(ids[:, :12]).logits_BSV, model(ids[:, 12:]).logits_BSV], 1)
    # the packed document has other positions, whose float32 rotations differ in the last bits
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-6)


def test_the_window_reaches_exactly_its_width():
    """In one layer, the last of 20 tokens sees exactly itself and the W − 1 tokens before it."""
    config = ModelConfig(mlp=Mlp.dense, vocab_size=VOCAB, hidden_size=64, num_hidden_layers=1, sliding_window=6)
    model = Transformer(config, TopKRouterConfig(), ExpertsConfig()).double()
    model.init_weights(0)
    ids, last = tokens(1, 20), []
    for position in range(20):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % VOCAB
        last.append((model(changed).logits_BSV[0, -1] - model(ids).logits_BSV[0, -1]).abs().max().item())
    assert max(last[:14]) == 0
    assert min(last[14:]) > 0


@pytest.mark.parametrize("mlp", list(Mlp))
def test_outputs(mlp):
    model, ids = build(mlp), tokens(2, 10)
    scored, plain = model(ids, labels_BS=ids), model(ids)
    assert scored.logits_BSV is None
    assert plain.lm_loss_sum is None
    assert plain.logits_BSV.shape == (2, 10, VOCAB)
    assert len(plain.routers) == len(scored.routers) == (3 if mlp is Mlp.sparse else 0)


def test_initial_weights_depend_on_seed_and_name_only():
    """More layers and wider experts don't change other parameters; another seed changes all except norms."""
    normal = {"initializer": Initializer.normal}
    model, same, other = build(**normal), build(**normal), build(seed=1, **normal)
    larger = Transformer(
        ModelConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=5, **normal),
        TopKRouterConfig(),
        ExpertsConfig(),
    )
    torch.manual_seed(123)  # the global generator has no influence
    larger.init_weights(0)
    wider, others = dict(larger.named_parameters()), dict(other.named_parameters())
    for (name, parameter), twin in zip(model.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(parameter, twin), name
        assert torch.equal(parameter, wider[name]), name
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert not torch.equal(parameter, others[name]), name
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
    assert len(
        {parameter.flatten()[0].item() for name, parameter in model.named_parameters() if "norm" not in name}
    ) == (sum("norm" not in name for name, _ in model.named_parameters()))


def test_experts_start_alike_whichever_rank_holds_them():
    """Expert 5 of 8 equals local expert 1 of the rank that holds experts 4 … 7."""
    model = build(initializer=Initializer.normal)  # equal_output depends on the number of experts in all
    part = Transformer(model.config, TopKRouterConfig(num_experts=4), ExpertsConfig())
    for block in part.model.layers:
        block.mlp.experts.first_expert = 4
    part.init_weights(0)
    for whole, half in zip(model.model.layers, part.model.layers, strict=True):
        assert torch.equal(whole.mlp.experts.gate_up_proj[4:], half.mlp.experts.gate_up_proj)
        assert torch.equal(whole.mlp.experts.down_proj[4:], half.mlp.experts.down_proj)


def test_meta_construction_then_weights():
    """A model built on the meta device, allocated and initialised equals one built directly."""
    config = build().config
    with torch.device("meta"):
        model = Transformer(config, TopKRouterConfig(), ExpertsConfig())
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    model.init_weights(0)
    ids = tokens(1, 12)
    assert torch.equal(model(ids).logits_BSV, build()(ids).logits_BSV)


def test_tied_head_is_one_parameter():
    model = build(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_bfloat16_trains():
    model, ids = build().bfloat16(), tokens(2, 20)
    output = model(ids, labels_BS=ids)
    output.lm_loss_sum.backward()
    assert output.lm_loss_sum.dtype == torch.float32
    reference = build()(ids, labels_BS=ids).lm_loss_sum
    torch.testing.assert_close(output.lm_loss_sum, reference, rtol=5e-3, atol=0)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_an_impossible_backend_is_refused():
    with pytest.raises(ValueError, match=r"model.attention=varlen can't run here"):
        build(attention=AttentionBackend.varlen)(tokens(1, 4))


@pytest.mark.parametrize("mlp", list(Mlp))
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("chunks", [[23], [1] * 23, [9, 9, 5], [3, 1, 12, 1, 6]], ids=["one", "ones", "nines", "mixed"])
def test_cached_logits_equal_uncached(mlp, window, chunks):
    """With chunks larger and smaller than the window, single tokens after chunks, and several documents."""
    model, ids = build(mlp, sliding_window=window).double().eval(), tokens(2, 23)
    documents = torch.tensor([[0] * 23, [0] * 4 + [1] * 19])
    cache = KVCache(model.config, 2, 23, torch.device("cpu"), torch.float64)
    assert cache.slots == min(window or 23, 23)
    parts, start = [], 0
    with torch.no_grad():
        for count in chunks:
            piece = slice(start, start + count)
            parts.append(model(ids[:, piece], document_ids_BS=documents[:, piece], cache=cache).logits_BSV)
            start += count
        expected = model(ids, document_ids_BS=documents).logits_BSV
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-12)


def test_a_full_cache_is_an_error():
    model = build()
    cache = KVCache(model.config, 1, 4, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        model(tokens(1, 3), cache=cache)
        with pytest.raises(ValueError, match="cache holds max_length=4 positions, position 4 doesn't fit"):
            model(tokens(1, 2), cache=cache)


def test_the_cache_has_as_many_slots_as_the_window():
    small, large = (
        KVCache(build(sliding_window=6).config, 1, length, torch.device("cpu"), torch.float32).nbytes
        for length in (50, 5000)
    )
    assert small == large == 2 * 3 * 6 * 2 * 16 * 4  # k and v, layers, slots, heads, head_dim, bytes
