"""Compares every kernel, on every device of this machine, with its plain reference in float64: outputs and gradients;
and the whole model on CUDA with the CPU. Running on the CPU too shows that the tests themselves work."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from moe.config import ExpertBackend, ExpertsConfig, Mlp, ModelConfig, TopKRouterConfig
from moe.kernels.cross_entropy import cross_entropy_reference, linear_cross_entropy
from moe.kernels.expert_backends import (
    ExpertLoad,
    candidates,
    event_milliseconds,
    fastest,
    measure,
    resolve_backend,
    take,
)
from moe.kernels.grouped_swiglu import grouped_ffn, loop_ffn
from moe.kernels.policy import FUSED_DTYPES, choose_products, fused_obstacle, gemm_obstacle
from moe.kernels.rms_norm import rms_norm, rms_norm_reference
from moe.kernels.rotary import project_rotated, project_rotated_reference, rotary_table, rotated, rotated_reference
from moe.kernels.swiglu import swiglu, swiglu_reference
from moe.model.transformer import Transformer
from moe.sparse.balance import balance_loss

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda", 0), marks=needs_cuda)]
on_devices = pytest.mark.parametrize("device", DEVICES, ids=str)
PRECISIONS = [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)]
in_precisions = pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def exact() -> None:
    if torch.cuda.is_available():
        choose_products(torch.device("cuda"))


def randoms(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5 for shape in shapes]


def outcome(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output and the inputs' gradients; the output's gradient is the same on all devices."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = function(*leaves)
    (grad,) = randoms(tuple(y.shape))
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y))]


def compare(
    fast: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], device: torch.device,
    dtype: torch.dtype, tolerance: float,
) -> None:  # fmt: skip
    """Compares with `plain`, run in float64 on the CPU with the inputs rounded to `dtype`."""
    rounded = [tensor.to(dtype) for tensor in inputs]
    actual = outcome(fast, [tensor.to(device) for tensor in rounded])
    expected = outcome(plain, [tensor.double() for tensor in rounded])
    for index, (mine, exact_) in enumerate(zip(actual, expected, strict=True)):
        assert mine.device.type == device.type
        error = (mine.cpu().double() - exact_).norm() / exact_.norm().clamp(min=1e-12)
        assert error <= tolerance, f"output or gradient {index}: {error:.1e}"


@on_devices
@in_precisions
class TestKernels:
    def test_rms_norm(self, device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
        inputs = randoms((3, 7, 64), (64,))
        compare(
            lambda x, w: rms_norm(x, w, 1e-5),
            lambda x, w: rms_norm_reference(x, w, 1e-5),
            inputs,
            device,
            dtype,
            tolerance,
        )

    def test_swiglu(self, device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
        compare(swiglu, swiglu_reference, randoms((9, 64), (9, 64)), device, dtype, tolerance)

    def test_rotation(self, device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
        table = rotary_table(2, 11, 16, 1e4, device, dtype)
        exact_table = rotary_table(2, 11, 16, 1e4, torch.device("cpu"), torch.float64)
        fast, plain = (lambda x: rotated(x, table)), (lambda x: rotated_reference(x, exact_table))
        compare(fast, plain, randoms((2, 11, 4, 16)), device, dtype, tolerance)

    def test_projection(self, device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
        table = rotary_table(2, 11, 16, 1e4, device, dtype)
        exact_table = rotary_table(2, 11, 16, 1e4, torch.device("cpu"), torch.float64)
        inputs = randoms((2, 11, 32), (64, 32), (32, 32), (32, 32))
        compare(
            lambda *t: torch.cat(project_rotated(*t, table), 2),
            lambda *t: torch.cat(project_rotated_reference(*t, exact_table), 2),
            inputs, device, dtype, tolerance,
        )  # fmt: skip

    def test_cross_entropy(self, device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
        labels = torch.arange(150) % 80
        labels[::4] = -100
        fast = lambda x, w: linear_cross_entropy(x, w, labels.to(device))  # noqa: E731
        plain = lambda x, w: cross_entropy_reference(x @ w.T, labels)  # noqa: E731
        compare(fast, plain, randoms((150, 32), (80, 32)), device, dtype, tolerance)

    @pytest.mark.parametrize("counts", [[5, 1, 9, 3], [0, 0, 17, 0], [0, 8, 8, 0], [0, 0, 0, 0]], ids=str)
    @pytest.mark.parametrize("asked", [ExpertBackend.auto, ExpertBackend.per_expert, ExpertBackend.triton])
    def test_grouped_swiglu(
        self, device: torch.device, dtype: torch.dtype, tolerance: float, counts: list[int], asked: ExpertBackend
    ) -> None:
        if asked is ExpertBackend.triton and device.type == "cpu":
            pytest.skip("needs CUDA: tests/unit/kernels/fused/test_gemm.py interprets it")
        backend, _ = resolve_backend(ExpertsConfig(backend=asked), device, dtype, (32, 64))
        inputs = randoms((sum(counts), 32), (4, 128, 32), (4, 32, 64))
        counts_E = torch.tensor(counts, device=device)
        fast = lambda *t: grouped_ffn(t[0], counts_E, t[1], t[2], backend)  # noqa: E731
        plain = lambda *t: loop_ffn(t[0], counts, t[1], t[2])  # noqa: E731
        compare(fast, plain, inputs, device, dtype, tolerance)


@needs_cuda
@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=str)
def test_every_triton_kernel_is_right(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    assert fused_obstacle(torch.device("cuda", 0), dtype) is None
    assert gemm_obstacle(torch.device("cuda", 0), dtype) is None


def model_of(mlp: Mlp, **settings: object) -> Transformer:
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    model = Transformer(ModelConfig(mlp=mlp, **sizes, **settings), TopKRouterConfig(), ExpertsConfig())
    model.init_weights(0)
    return model


@on_devices
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mlp", list(Mlp))
@pytest.mark.parametrize("window", [None, 8])
def test_the_model_equals_the_float64_one(
    device: torch.device, dtype: torch.dtype, tolerance: float, mlp: Mlp, window: int | None
) -> None:
    """Loss and gradients. Every token goes to every expert, so that rounding can't send a token elsewhere."""
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(0, 96, (2, 40), generator=generator)
    documents_BS = torch.tensor([[0] * 11 + [1] * 29, [0] * 40], dtype=torch.int32)
    outcomes = []
    for where, precision in ((torch.device("cpu"), torch.float64), (device, dtype)):
        model = model_of(mlp, sliding_window=window).to(where, precision)
        for block in model.model.layers:
            if mlp is Mlp.sparse:
                block.mlp.gate.config = TopKRouterConfig(top_k=8)
        here = [tensor.to(where) for tensor in (ids_BS, documents_BS)]
        output = model(here[0], document_ids_BS=here[1], labels_BS=here[0])
        loss = output.lm_loss_sum
        if output.routers:
            loss = loss + balance_loss(output.routers)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        outcomes.append([loss.detach(), *gradients])
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for name, exact_, mine in zip(names, *outcomes, strict=True):
        error = (mine.cpu().double() - exact_).norm() / exact_.norm()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.fixture
def no_waits() -> Iterator[None]:
    """Makes the CUDA runtime raise when the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("mlp", list(Mlp))
def test_a_training_pass_waits_for_nothing_but_late_counts(mlp: Mlp, request: pytest.FixtureRequest) -> None:
    model = model_of(mlp).to("cuda", torch.bfloat16)
    ids_BS = torch.zeros(2, 40, dtype=torch.int64, device="cuda")
    documents_BS = torch.zeros(2, 40, dtype=torch.int32, device="cuda")
    documents_BS[0, 30:] = 1
    documents = {"document_ids_BS": documents_BS, "document_lengths": [30, 10, 40]}
    model(ids_BS, labels_BS=ids_BS, **documents).lm_loss_sum.backward()  # libraries start up
    request.getfixturevalue("no_waits")
    model(ids_BS, labels_BS=ids_BS).lm_loss_sum.backward()  # the debug mode doesn't report waits for events
    model(ids_BS, labels_BS=ids_BS, **documents).lm_loss_sum.backward()


@needs_cuda
def test_megablocks_equals_the_oracle() -> None:
    pytest.importorskip("megablocks")
    pytest.importorskip("grouped_gemm")
    counts, inputs = [5, 0, 9, 4], randoms((18, 32), (4, 128, 32), (4, 32, 64))
    counts_E = torch.tensor(counts, device="cuda")
    fast = lambda *t: grouped_ffn(t[0], counts_E, t[1], t[2], ExpertBackend.megablocks)  # noqa: E731
    plain = lambda *t: loop_ffn(t[0], counts, t[1], t[2])  # noqa: E731
    compare(fast, plain, inputs, torch.device("cuda"), torch.bfloat16, 2e-2)


@needs_cuda
def test_auto_takes_what_it_measured() -> None:
    device, load = torch.device("cuda", 0), ExpertLoad(256, 512, 4, 1024)
    shapes, tried = (load.hidden, load.feed), candidates(device, torch.bfloat16, (load.hidden, load.feed))
    times = measure(tried, load, device, torch.bfloat16, event_milliseconds)
    assert not times.left_out
    assert times.milliseconds.keys() == tried.keys()
    take([times], device, torch.bfloat16, load)
    assert resolve_backend(ExpertsConfig(), device, torch.bfloat16, shapes)[0] is fastest(times.milliseconds)
