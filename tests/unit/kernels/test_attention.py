"""Every attention back-end against a masked float64 reference in this file: outputs and gradients."""

import math
import random

import pytest
import torch
from torch import Tensor

from moe.bench.attention import HEAD_DIM, HEADS, multiply_adds_per_token
from moe.config import AttentionBackend, ModelConfig
from moe.kernels.attention import make_attend, resolve_attention
from moe.kernels.attention.flash3 import flash3_obstacle
from moe.kernels.attention.flex import _mask
from moe.kernels.attention.pattern import document_bounds
from moe.kernels.attention.together import Together
from moe.kernels.attention.varlen import varlen_obstacle

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def reference(q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, window: int | None, documents: list[list[int]]) -> Tensor:
    """One query and key at a time, to share no mask arithmetic with the code under test."""
    batch, length, heads, dim = q_BSND.shape
    group = heads // k_BSGD.shape[2]
    rows = []
    for b in range(batch):
        for i in range(length):
            reach = range(0 if window is None else max(0, i - window + 1), i + 1)
            seen = [j for j in reach if documents[b][j] == documents[b][i]]
            for n in range(heads):
                keys, values = k_BSGD[b, seen, n // group], v_BSGD[b, seen, n // group]
                rows.append(torch.softmax(keys @ q_BSND[b, i, n] / math.sqrt(dim), 0) @ values)
    return torch.stack(rows).view(batch, length, heads * dim)


def inputs(shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    batch, length, heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((batch, length, heads, dim), (batch, length, kv_heads, dim), (batch, length, kv_heads, dim))
    return tuple(
        torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_() for size in sizes
    )


def outcome(function, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    out = function(*tensors)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, tensors, weight.to(out))]


ONE, PACKED = [[0] * 45, [0] * 45], [[0] * 7 + [1] * 30 + [2] * 8, [0] * 44 + [5]]


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("window", [None, 1, 9, 44, 64])
@pytest.mark.parametrize("documents", [ONE, PACKED], ids=["one", "packed"])
def test_equals_the_float64_reference(kv_heads, window, documents):
    tensors = inputs((2, 45, 4, kv_heads, 6), torch.float64)
    ids = None if documents is ONE else torch.tensor(documents)
    expected = outcome(lambda *t: reference(*t, window, documents), tensors)
    for backend in (AttentionBackend.naive, AttentionBackend.block):
        attend = make_attend(backend, (2, 45), window, ids, CPU)
        for actual, wanted in zip(outcome(attend, tensors), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("length", "window"), [(129, None), (300, None), (513, None), (700, 64), (300, 33), (512, 512)]
)
def test_block_equals_naive_over_many_blocks(length, window):
    """Lengths that aren't multiples of the block size, windows that change it, documents across block boundaries."""
    tensors = inputs((2, length, 4, 2, 8), torch.float64)
    ids = torch.zeros(2, length, dtype=torch.int32)
    ids[0, 131:] = 1
    for documents in (None, ids):
        naive, block = (
            outcome(make_attend(backend, (2, length), window, documents, CPU), tensors)
            for backend in (AttentionBackend.naive, AttentionBackend.block)
        )
        for actual, wanted in zip(block, naive, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 20, 64])
def test_many_short_documents_share_calls(window):
    """Documents of 1 to 200 tokens, in groups by length; the pads' numbers must reach nothing."""
    draw = random.Random(0)
    lengths = [1, 2, 3, 4, 5, 64, 65, 128, 129, 129, 200] + [draw.randrange(1, 40) for _ in range(30)]
    draw.shuffle(lengths)
    ids = torch.cat([torch.full((length,), index) for index, length in enumerate(lengths)])
    ids = torch.stack((ids, ids.flip(0).neg()))
    together = Together.of(2 * lengths, CPU)
    assert together is not None
    assert len(together.take_P) < 2 * ids.numel()
    assert len(together.shapes) < len(lengths) / 2
    tensors = inputs((*ids.shape, 4, 2, 6), torch.float64)
    naive, block = (
        outcome(make_attend(backend, (2, ids.shape[1]), window, ids, CPU), tensors)
        for backend in (AttentionBackend.naive, AttentionBackend.block)
    )
    for actual, wanted in zip(block, naive, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 9])
def test_lengths_known_to_the_host_change_nothing(window):
    ids, lengths = torch.tensor(PACKED), document_bounds(torch.tensor(PACKED), 2, 45, CPU).diff().tolist()
    tensors = inputs((2, 45, 4, 2, 6), torch.float64)
    for backend in (AttentionBackend.naive, AttentionBackend.block):
        counted, known = (make_attend(backend, (2, 45), window, ids, CPU, given)(*tensors) for given in (None, lengths))
        assert torch.equal(counted, known)
    with pytest.raises(ValueError, match=r"document_lengths: their sum is 45, not B·S = 90"):
        make_attend(AttentionBackend.block, (2, 45), window, ids, CPU, [45])


def test_documents_of_other_lengths_share_no_call():
    assert Together.of([3, 5, 9, 200, 200], CPU) is None


def test_documents_that_all_rows_share_are_still_kept_apart():
    """All rows start and end with the same document ids, which differ only in the middle."""
    ids = torch.tensor([[0, 0, 1, 1, 2], [0, 0, 1, 1, 2]])
    tensors = inputs((2, 5, 2, 2, 4), torch.float64)
    actual = make_attend(AttentionBackend.block, (2, 5), None, ids, CPU)(*tensors)
    torch.testing.assert_close(actual, reference(*tensors, None, ids.tolist()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 9])
def test_flex_pattern_equals_the_reference(window):
    """The block mask that CUDA compiles, in eager flex_attention, which has no backward pass on a CPU."""
    q, k, v = (tensor.detach().float() for tensor in inputs((2, 45, 4, 2, 16), torch.float64))
    attend = make_attend(AttentionBackend.flex, (2, 45), window, torch.tensor(PACKED), CPU)
    torch.testing.assert_close(attend(q, k, v), reference(q, k, v, window, PACKED), rtol=0, atol=2e-6)


@pytest.mark.slow  # dynamo and vmap take half a minute to trace
def test_flex_compiles_once_for_all_windows_and_documents():
    """Runs only the compiler's front end, which decides when to recompile. A second length makes the sizes symbolic, so
    that a third needs no recompilation."""
    from torch._dynamo.testing import CompileCounter
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    counters = CompileCounter(), CompileCounter()
    create, attend = (
        torch.compile(function, backend=counter)
        for function, counter in zip((create_block_mask, flex_attention), counters, strict=True)
    )
    compiled = []
    for length, window in ((128, None), (128, 9), (128, 30), (256, 9), (256, None), (384, 5), (512, 77)):
        documents = (torch.arange(length) // (length // 3 + 1)).int().repeat(2, 1)
        documents[1] //= 2
        mask = create(_mask(documents, torch.tensor(window or length)), 2, None, length, length, device=CPU)
        q, k, v = (tensor.detach().float() for tensor in inputs((2, length, 4, 2, 16), torch.float64))
        heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out = attend(*heads_first, block_mask=mask, enable_gqa=True).transpose(1, 2).flatten(2)
        expected = make_attend(AttentionBackend.naive, (2, length), window, documents, CPU)(q, k, v)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
        compiled.append(tuple(counter.frame_count for counter in counters))
    assert compiled == [(1, 1)] * 3 + [(2, 2)] * 4


def test_document_bounds_never_join_rows():
    bounds = document_bounds(torch.tensor([[0, 0, 1], [1, 1, 1]]), 2, 3, CPU)
    assert bounds.tolist() == [0, 2, 3, 6]
    assert document_bounds(None, 2, 3, CPU).tolist() == [0, 3, 6]


@pytest.mark.parametrize(("length", "window"), [(45, None), (300, None), (300, 33)])
def test_bfloat16_on_a_cpu_is_rounded_only_at_the_ends(length, window):
    """Inputs are bfloat16, so are outputs and gradients; everything between is as in float32."""
    narrow = inputs((2, length, 4, 2, 8), torch.bfloat16)
    wide = tuple(tensor.detach().float().requires_grad_() for tensor in narrow)
    attend = make_attend(AttentionBackend.block, (2, length), window, None, CPU)
    out, exact = attend(*narrow), attend(*wide)
    assert torch.equal(out, exact.bfloat16())
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    for mine, theirs in zip(
        torch.autograd.grad(out, narrow, weight), torch.autograd.grad(exact, wide, weight.float()), strict=True
    ):
        assert torch.equal(mine, theirs.bfloat16())


@needs_cuda
@pytest.mark.parametrize(
    "backend", [AttentionBackend.flash3, AttentionBackend.varlen, AttentionBackend.flex, AttentionBackend.block]
)
@pytest.mark.parametrize("window", [None, 1, 9, 64])
@pytest.mark.parametrize("documents", [ONE, PACKED], ids=["one", "packed"])
def test_cuda_backends_equal_the_float64_reference(backend, window, documents):
    dtype = torch.bfloat16
    if backend is AttentionBackend.flash3 and (obstacle := flash3_obstacle(torch.device("cuda"), dtype, 64)):
        pytest.skip(obstacle)
    tensors = inputs((2, 45, 4, 2, 64), dtype, "cuda")
    ids = None if documents is ONE else torch.tensor(documents, device="cuda")
    attend = make_attend(backend, (2, 45), window, ids, torch.device("cuda"))
    wide = tuple(tensor.detach().double().requires_grad_() for tensor in tensors)
    expected = outcome(lambda *t: reference(*t, window, documents), wide)
    for actual, wanted in zip(outcome(attend, tensors), expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=0.02, atol=0.02)


def test_auto_on_cpu_is_block_and_says_why():
    backend, reason = resolve_attention(AttentionBackend.auto, CPU, torch.float32, 32)
    assert backend is AttentionBackend.block
    assert "linear" in reason


@pytest.mark.parametrize("backend", [AttentionBackend.flash3, AttentionBackend.varlen, AttentionBackend.flex])
def test_an_explicit_backend_that_cannot_run_is_one_line(backend):
    with pytest.raises(ValueError, match=f"model.attention={backend.value} can't run here: .*cpu; use auto") as caught:
        resolve_attention(backend, CPU, torch.float32, 32)
    assert "\n" not in str(caught.value)


def test_varlen_names_the_rule_it_breaks():
    cuda = torch.device("cuda")
    assert "bfloat16" in varlen_obstacle(cuda, torch.float32, 64)
    assert "model.head_dim=36" in varlen_obstacle(cuda, torch.bfloat16, 36)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_dim": 33}, "model.head_dim=33 must be even"),
        ({"hidden_size": 130}, "model.hidden_size=130 must be divisible by model.num_attention_heads=4"),
        ({"num_key_value_heads": 3}, "model.num_attention_heads=4 must be divisible by model.num_key_value_heads=3"),
        ({"sliding_window": 0}, "model.sliding_window=0 must be ≥ 1"),
    ],
)
def test_shapes_that_attention_cannot_have(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)


def test_attention_with_a_window_is_linear():
    """Multiply-adds per token at 16,384 tokens are at most 1.15 × those at 2,048 (1.125 × is needed)."""
    short, long = multiply_adds_per_token(2048, 512), multiply_adds_per_token(16384, 512)
    assert long / short <= 1.15
    visible = 512 - 512 * 511 / (2 * 16384)
    needed = (2 + 5) * HEADS * HEAD_DIM * visible  # the forward pass's products and the backward pass's
    assert 1 <= long / needed <= 1.3  # what blocks compute beyond the band


def test_the_count_sees_quadratic_attention():
    """Without a window the counter must grow with the length; otherwise the test above would prove nothing."""
    assert multiply_adds_per_token(4096, None) == pytest.approx(2 * multiply_adds_per_token(2048, None))
