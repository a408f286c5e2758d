"""Runs the CUDA code on fake tensors (no data) to find wrong devices, dtypes and shapes, and waits for the GPU.

Needs a CUDA build of torch and no GPU:  python -m pytest tests/unit/kernels/test_cuda_fake.py -rs
Autograd can't run a backward pass on fake tensors, so hand-written ones are called as functions. No values are
computed: tests on a device must show that results are right.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe.config import AttentionBackend, ExpertBackend, ExpertsConfig, Mlp, ModelConfig, Recompute, TopKRouterConfig
from moe.kernels.attention import make_attend, resolve_attention
from moe.kernels.attention.flex import _mask
from moe.kernels.cross_entropy import HandWrittenLinearCrossEntropy
from moe.kernels.expert_backends import resolve_backend
from moe.kernels.expert_swiglu import GroupedSwiGLU, PerExpertSwiGLU
from moe.kernels.float8_products import float8_products
from moe.kernels.grouped_products import per_expert_products, torch_products
from moe.kernels.permute import RowOrder, _CombineRows, _GatherRows
from moe.kernels.rms_norm import HandWrittenRMSNorm, rms_norm
from moe.kernels.rotary import HandWrittenProjectRotated, HandWrittenRotation, rotary_table
from moe.kernels.swiglu import HandWrittenSwiGLU
from moe.model.cache import KVCache
from moe.model.transformer import Transformer

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason="needs a CUDA build of torch: FakeTensorMode on cuda"
)
CUDA = torch.device("cuda", 0)
DTYPES = [torch.bfloat16, torch.float32]
SCALED_GROUPED_MM: Any = torch.nn.functional.scaled_grouped_mm  # type: ignore[attr-defined]
T, H, F, E, V = 48, 32, 64, 4, 80


class _Event:
    """Replaces torch.cuda.Event, which needs a device."""

    def record(self) -> None: ...


def _checked_grouped_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, how_a: Any, scale_b: Tensor, how_b: Any, *, offs: Tensor, output_dtype: Any
) -> Tensor:
    """`scaled_grouped_mm` by the operator below it, which has checks of dtypes, strides and scales for fake tensors."""
    inspect.signature(SCALED_GROUPED_MM).bind(
        a, b, scale_a, how_a, scale_b, how_b, offs=offs, output_dtype=output_dtype
    )
    by_row = torch.nn.functional.ScalingType.RowWise  # type: ignore[attr-defined]
    assert how_a == how_b == by_row
    return torch._scaled_grouped_mm(a, b, scale_a, scale_b, offs=offs, out_dtype=output_dtype)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)  # needs a device
    monkeypatch.setattr(torch.nn.functional, "scaled_grouped_mm", _checked_grouped_mm)


@pytest.fixture
def fake() -> Iterator[None]:
    """Fake tensors; reading a value on the host gives a symbol."""
    with FakeTensorMode(shape_env=ShapeEnv()):
        yield


@pytest.fixture
def fake_without_waits() -> Iterator[None]:
    """Fake tensors; reading a value on the host raises."""
    with FakeTensorMode():
        yield


class Context:
    """Replaces the context that a torch.autograd.Function gets for its two passes."""

    def __init__(self, inputs: int) -> None:
        self.needs_input_grad = (True,) * inputs
        self.saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=CUDA)


def check(function: Any, *inputs: Any) -> Any:
    """Runs both passes; every gradient must have its input's device, dtype and shape. Returns the outputs."""
    with torch.no_grad():
        context = Context(len(inputs))
        outputs = function.forward(context, *inputs)
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = function.backward(context, *(torch.empty_like(output) for output in several))
    assert all(output.device == CUDA for output in several)
    for value, gradient in zip(inputs, gradients, strict=True):
        if isinstance(value, Tensor) and value.is_floating_point():
            assert (gradient.device, gradient.dtype, gradient.shape) == (CUDA, value.dtype, value.shape)
        else:
            assert gradient is None
    return outputs


@pytest.mark.usefixtures("fake_without_waits")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestKernels:
    def test_rows_into_expert_order_and_back(self, dtype: torch.dtype) -> None:
        rows, weights_TK = empty(2 * T, H, dtype=dtype), empty(T, 2, dtype=torch.float32)
        indices_N = torch.empty(2 * T, dtype=torch.int64, device=CUDA)
        order = RowOrder(
            indices_N, indices_N, indices_N.view(T, 2), torch.empty(E, dtype=torch.int64, device=CUDA), None
        )
        assert check(_GatherRows, empty(T, H, dtype=dtype), order).shape == (2 * T, H)
        assert check(_CombineRows, rows, weights_TK, order).shape == (T, H)

    def test_rms_norm(self, dtype: torch.dtype) -> None:
        x, weight = empty(2, T, H, dtype=dtype), empty(H, dtype=dtype)
        assert check(HandWrittenRMSNorm, x, weight, 1e-5).dtype == rms_norm(x, weight, 1e-5).dtype == dtype

    def test_rotary(self, dtype: torch.dtype) -> None:
        table = rotary_table(3, T, 8, 1e4, CUDA, dtype)
        assert table.cos_S1D.device == CUDA
        x, q, k = empty(2, T, H, dtype=dtype), empty(32, H, dtype=dtype), empty(16, H, dtype=dtype)
        outputs = check(HandWrittenProjectRotated, x, q, k, k, table)
        assert [tuple(output.shape) for output in outputs] == [(2, T, 4, 8), (2, T, 2, 8), (2, T, 2, 8)]
        assert check(HandWrittenRotation, empty(2, T, 4, 8, dtype=dtype), table).shape == (2, T, 4, 8)

    def test_swiglu(self, dtype: torch.dtype) -> None:
        assert check(HandWrittenSwiGLU, empty(T, F, dtype=dtype), empty(T, F, dtype=dtype)).dtype == dtype

    def test_cross_entropy(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        from moe.kernels import cross_entropy

        labels = torch.empty(2 * T, dtype=torch.int64, device=CUDA)
        monkeypatch.setitem(cross_entropy.SLICE_ELEMENTS, "cuda", 1)
        x, weight = empty(2 * T, H, dtype=dtype), empty(V, H, dtype=dtype)
        assert check(HandWrittenLinearCrossEntropy, x, weight, labels, True).dtype == torch.float32

    def test_grouped_swiglu(self, dtype: torch.dtype) -> None:
        weights = empty(E, 2 * F, H, dtype=dtype), empty(E, H, F, dtype=dtype)
        counts = [T, 0, 0, 0]
        counts_E = torch.empty(E, dtype=torch.int64, device=CUDA)
        if dtype is torch.bfloat16:  # grouped_mm takes no other dtype there
            for products in (torch_products(counts_E), float8_products(counts_E)):
                y = check(GroupedSwiGLU, empty(T, H, dtype=dtype), *weights, lambda: counts, products)
                assert (y.shape, y.dtype) == ((T, H), dtype)
        y = check(GroupedSwiGLU, empty(T, H, dtype=dtype), *weights, lambda: counts, per_expert_products(counts))
        assert (y.shape, y.dtype) == ((T, H), dtype)
        for rows in (counts, [0] * E):
            y = check(PerExpertSwiGLU, empty(sum(rows), H, dtype=dtype), *weights, rows)
            assert y.shape == (sum(rows), H)


@pytest.mark.usefixtures("fake_without_waits")
@pytest.mark.parametrize("window", [None, 1, 9, T])
@pytest.mark.parametrize("backend", [AttentionBackend.varlen, AttentionBackend.block, AttentionBackend.naive])
def test_attention_of_one_document_a_row(backend: AttentionBackend, window: int | None) -> None:
    q, kv = empty(2, T, 4, 16, dtype=torch.bfloat16), empty(2, T, 2, 16, dtype=torch.bfloat16)
    out = make_attend(backend, (2, T), window, None, CUDA)(q, kv, kv)
    assert (out.device, out.dtype, out.shape) == (CUDA, torch.bfloat16, (2, T, 64))


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("window", [None, 1, 9, T])
def test_varlen_over_documents(window: int | None) -> None:
    q, kv = empty(2, T, 4, 16, dtype=torch.bfloat16), empty(2, T, 2, 16, dtype=torch.bfloat16)
    documents = torch.empty(2, T, dtype=torch.int32, device=CUDA)
    out = make_attend(AttentionBackend.varlen, (2, T), window, documents, CUDA)(q, kv, kv)
    assert (out.device, out.dtype, out.shape) == (CUDA, torch.bfloat16, (2, T, 64))


@pytest.mark.usefixtures("fake_without_waits")
@pytest.mark.parametrize("window", [None, 1, 9, T])
def test_varlen_over_documents_of_known_lengths_never_waits(window: int | None) -> None:
    q, kv = empty(2, T, 4, 16, dtype=torch.bfloat16), empty(2, T, 2, 16, dtype=torch.bfloat16)
    documents = torch.empty(2, T, dtype=torch.int32, device=CUDA)
    given = AttentionBackend.varlen, (2, T), window, documents, CUDA
    out = make_attend(*given, [T - 3, 3, 1, T - 1])(q, kv, kv)
    assert (out.device, out.dtype, out.shape) == (CUDA, torch.bfloat16, (2, T, 64))
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        make_attend(*given)


@pytest.mark.usefixtures("fake_without_waits")
@pytest.mark.parametrize("window", [None, 9])
def test_the_pattern_of_flex(window: int | None) -> None:
    """Only the mask, in eager mode: flex attention on CUDA must be compiled, which needs a device."""
    documents = torch.empty(2, T, dtype=torch.int32, device=CUDA)
    reach = torch.full((), T if window is None else window, device=CUDA)
    positions = torch.arange(T, device=CUDA)
    seen = _mask(documents, reach)(torch.zeros_like(positions), positions, positions, positions)
    assert (seen.device, seen.dtype) == (CUDA, torch.bool)


def test_auto_takes_the_fast_kernels_on_every_supported_torch() -> None:
    attention, _ = resolve_attention(AttentionBackend.auto, CUDA, torch.bfloat16, 128)
    experts, _ = resolve_backend(ExpertsConfig(), CUDA, torch.bfloat16, (4096, 14336))
    assert (attention, experts) == (AttentionBackend.varlen, ExpertBackend.grouped_mm)


def transformer(
    mlp: Mlp, dtype: torch.dtype, backend: ExpertBackend = ExpertBackend.auto, *, fp8: bool = False, **model: Any
) -> Transformer:
    sizes = {"vocab_size": V, "hidden_size": H, "intermediate_size": F, "num_hidden_layers": 2, "head_dim": 16}
    config = ModelConfig(mlp=mlp, **sizes, **model)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with CUDA:
            return Transformer(config, TopKRouterConfig(), ExpertsConfig(backend=backend, fp8=fp8))
    finally:
        torch.set_default_dtype(before)


def run(model: Transformer, documents_BS: Tensor | None, lengths: list[int] | None = None) -> None:
    ids_BS = torch.empty(2, T, dtype=torch.int64, device=CUDA)
    documents: dict[str, Any] = {"document_ids_BS": documents_BS, "document_lengths": lengths}
    loss = model(ids_BS, **documents, labels_BS=ids_BS).lm_loss_sum
    assert (loss.device, loss.dtype, loss.shape) == (CUDA, torch.float32, ())
    logits = model(ids_BS, **documents).logits_BSV
    assert (logits.device, logits.dtype, logits.shape) == (CUDA, model.dtype, (2, T, V))


@pytest.mark.usefixtures("fake_without_waits")
@pytest.mark.parametrize("mlp", list(Mlp))
@pytest.mark.parametrize("model", [{}, {"sliding_window": 8}, {"tie_word_embeddings": True}], ids=str)
@pytest.mark.parametrize("recompute", list(Recompute))
def test_a_forward_pass_never_waits_for_the_gpu(mlp: Mlp, model: dict[str, Any], recompute: Recompute) -> None:
    run(transformer(mlp, torch.bfloat16, recompute=recompute, **model), None)
    documents_BS = torch.empty(2, T, dtype=torch.int32, device=CUDA)
    run(transformer(mlp, torch.bfloat16, recompute=recompute, **model), documents_BS, [T - 3, 3, 1, T - 1])
    if mlp is Mlp.sparse:
        run(transformer(mlp, torch.bfloat16, fp8=True, recompute=recompute, **model), None)


@pytest.mark.usefixtures("fake_without_waits")
def test_a_wait_is_detected() -> None:
    model = transformer(Mlp.sparse, torch.bfloat16, ExpertBackend.loop)  # reads the counts on the host
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        run(model, None)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("mlp", list(Mlp))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [ExpertBackend.auto, ExpertBackend.loop])
@pytest.mark.parametrize("attention", [AttentionBackend.varlen, AttentionBackend.naive])
def test_a_forward_pass_over_documents(
    mlp: Mlp, dtype: torch.dtype, backend: ExpertBackend, attention: AttentionBackend
) -> None:
    if attention is AttentionBackend.varlen and dtype is torch.float32:
        attention = AttentionBackend.naive  # FlashAttention has half precisions only
    documents_BS = torch.empty(2, T, dtype=torch.int32, device=CUDA)
    run(transformer(mlp, dtype, backend, attention=attention), documents_BS)


@pytest.mark.usefixtures("fake_without_waits")
@pytest.mark.parametrize("window", [None, 8])
def test_cached_generation(window: int | None) -> None:
    model = transformer(Mlp.sparse, torch.bfloat16, sliding_window=window).eval()
    with torch.no_grad():
        cache = KVCache(model.config, 2, 20, model.device, model.dtype)
        for count in (9, 1, 1, 5):
            ids_BS = torch.empty(2, count, dtype=torch.int64, device=CUDA)
            logits = model(ids_BS, cache=cache).logits_BSV
            assert (logits.device, logits.shape) == (CUDA, (2, count, V))
