"""FlashAttention 3 on a CPU: torch's adapter and ours are the real ones, the package's kernels are stand-ins with its
published arguments. Whether its kernels compute correctly is compared on the GPU where it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import Library
from torch.nn import attention
from torch.nn.attention import _fa3

from moe.config import AttentionBackend
from moe.errors import UserError
from moe.kernels.attention import flash3, make_attend, resolve_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16
FORWARD = """fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? qv, Tensor? out_, Tensor?
 cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k,
 int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k,
 Tensor? rotary_cos, Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor?
 k_descale, Tensor? v_descale, float? softmax_scale, bool causal, int window_size_left, int
 window_size_right, int attention_chunk, float softcap, bool rotary_interleaved, Tensor?
 scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin) -> (Tensor, Tensor, Tensor,
 Tensor)"""
BACKWARD = """bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!) dq,
 Tensor(b!) dk, Tensor(c!) dv, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? sequed_q, Tensor?
 sequed_k, int? max_seqlen_q, int? max_seqlen_k, float? softmax_scale, bool is_causal, int
 window_size_left, int window_size_right, float softcap, bool deterministic, int sm_margin) -> Tensor"""


class Kernels:
    """The stand-ins, and what is wrong with them."""

    def __init__(self) -> None:
        self.passes: list[str] = []
        self.extra_keys, self.gradient_scale, self.fails = 0, 1.0, False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        self.passes.append("forward")
        assert rest[4] is rest[5] or torch.equal(rest[4], rest[5])
        out = plain_forward(q, k, v, rest[4], rest[21], rest[22] + self.extra_keys if rest[22] >= 0 else -1, rest[23])
        return *out, torch.empty(0), torch.empty(0)

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> Tensor:
        self.passes.append("backward")
        if self.fails:
            raise RuntimeError("Deterministic backward not supported for hdim 256.\nStack trace")
        for gradient, wanted in zip(rest[:3], plain_backward(dout, q, k, v, rest[3], *rest[10:13]), strict=True):
            gradient.copy_(wanted * self.gradient_scale)
        return torch.empty(0)


def _documents(q: Tensor, k: Tensor, bounds: Tensor, causal: bool, left: int, right: int) -> Iterator[Any]:
    """(tokens, probabilities [N, S, S], log Σ exp [N, S]) of each document."""
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        tokens, shared = slice(start, end), q.shape[1] // k.shape[1]
        keys = k[tokens].float().repeat_interleave(shared, 1)
        scores = torch.einsum("snd,tnd->nst", q[tokens].float(), keys) * q.shape[2] ** -0.5
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = (distance > left if left >= 0 else torch.zeros_like(distance, dtype=torch.bool)) | (
            -distance > right if right >= 0 else torch.zeros_like(distance, dtype=torch.bool)
        )
        scores = scores.masked_fill(hidden | (distance < 0) if causal else hidden, float("-inf"))
        yield tokens, scores.softmax(-1), scores.logsumexp(-1)


def plain_forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *pattern: Any) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
    for tokens, probs, log_sum in _documents(q, k, bounds, *pattern):
        values = v[tokens].float().repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[tokens] = torch.einsum("nst,tnd->snd", probs, values).to(out.dtype)
        lse[:, tokens] = log_sum
    return out, lse


def plain_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *pattern: Any) -> list[Tensor]:
    dq, dk, dv = (torch.empty_like(tensor) for tensor in (q, k, v))
    groups, scale = k.shape[1], q.shape[2] ** -0.5
    for tokens, probs, _ in _documents(q, k, bounds, *pattern):
        shared = q.shape[1] // groups
        queries, grad = q[tokens].float(), dout[tokens].float()
        keys, values = (tensor[tokens].float().repeat_interleave(shared, 1) for tensor in (k, v))
        dprobs = torch.einsum("snd,tnd->nst", grad, values)
        dscores = probs * (dprobs - (dprobs * probs).sum(-1, keepdim=True)) * scale
        dq[tokens] = torch.einsum("nst,tnd->snd", dscores, keys).to(q.dtype)
        for gradient, product in ((dk, (dscores, queries)), (dv, (probs, grad))):
            whole = torch.einsum("nst,snd->tnd", *product)
            gradient[tokens] = whole.unflatten(1, (groups, shared)).sum(2).to(gradient.dtype)
    return [dq, dk, dv]


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """With an installed package of stand-ins; on a CPU, attention's operators are FlashAttention 2's or the package's,
    whichever torch has active."""
    stand_ins = Kernels()
    (tmp_path / f"{flash3.PACKAGE}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    package, aten = Library("flash_attn_3", "FRAGMENT"), Library("aten", "IMPL", "CPU")
    package.define(FORWARD)
    package.define(BACKWARD)
    package.impl("fwd", stand_ins.forward, "CPU")
    package.impl("bwd", stand_ins.backward, "CPU")

    def forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: Any, **others: Any) -> Any:
        window = others["window_size_left"], others["window_size_right"]
        if attention.current_flash_attention_impl() == "FA3":
            given = *rest[:2], others.get("scale"), rest[3], *window, None
            out, lse = _fa3._fa3_run_forward(q, k, v, cu_q, cu_k, *given)
        else:
            out, lse = plain_forward(q, k, v, cu_q, rest[3], *window)
        return out, lse, torch.empty(0), torch.empty(0), torch.empty(0)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: Any,
        **others: Any,
    ) -> Any:  # fmt: skip
        window = others["window_size_left"], others["window_size_right"]
        if attention.current_flash_attention_impl() == "FA3":
            given = *rest[:2], others.get("scale"), rest[3], *window
            return _fa3._fa3_run_backward(dout, q, k, v, out, lse, cu_q, cu_k, *given)
        return tuple(plain_backward(dout, q, k, v, cu_q, rest[3], *window))

    aten.impl("_flash_attention_forward", forward)
    aten.impl("_flash_attention_backward", backward)
    flash3.flash3_obstacle.cache_clear()
    yield stand_ins
    sys.modules.pop(flash3.PACKAGE, None)
    attention.restore_flash_attention_impl(_raise_warn=False)
    flash3.flash3_obstacle.cache_clear()
    package._destroy()
    aten._destroy()


def test_right_kernels_have_no_fault(kernels: Kernels) -> None:
    with torch.inference_mode():  # the first forward pass may be one
        assert flash3.find_flash3_fault(CPU, BF16, 16) == ""
    assert kernels.passes == ["forward", "backward"] * 2
    assert attention.current_flash_attention_impl() is None, "active only while it is used"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"extra_keys": 1}, "with a window it is wrong by "),
        ({"gradient_scale": 1.05}, "without a window it is wrong by 5."),
        ({"gradient_scale": float("nan")}, "without a window it is wrong by inf"),
        ({"fails": True}, "it failed: RuntimeError: Deterministic backward not supported for hdim 256."),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_fault_is_named(kernels: Kernels, wrong: dict[str, Any], message: str) -> None:
    vars(kernels).update(wrong)
    fault = flash3.find_flash3_fault(CPU, BF16, 16)
    assert fault.startswith(message)
    assert "\n" not in fault
    assert attention.current_flash_attention_impl() is None


def test_a_package_without_kernels_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{flash3.PACKAGE}.py").write_text("raise ImportError('libcudart.so.12: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    fault = flash3.find_flash3_fault(CPU, BF16, 16)
    assert fault == "it failed: ImportError: libcudart.so.12: cannot open"


def test_back_ends_of_one_process_take_their_own_kernels(kernels: Kernels) -> None:
    q, kv = torch.randn(2, 20, 4, 8).to(BF16), torch.randn(2, 20, 2, 8).to(BF16)
    for backend, passes in ((AttentionBackend.varlen, 0), (AttentionBackend.flash3, 1), (AttentionBackend.varlen, 1)):
        make_attend(backend, (2, 20), 5, None, CPU)(q, kv, kv)
        assert len(kernels.passes) == passes


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    gpu = SimpleNamespace(capability=(9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: gpu.capability)
    flash3.flash3_obstacle.cache_clear()
    return gpu


def test_auto_says_why_it_does_not_run(hopper: SimpleNamespace) -> None:
    backend, reason = resolve_attention(AttentionBackend.auto, CUDA, BF16, 64)
    assert backend is AttentionBackend.varlen
    assert reason == "the fastest that runs here; flash3: flash_attn_interface isn't installed"
    hopper.capability = (10, 0)
    flash3.flash3_obstacle.cache_clear()
    assert resolve_attention(AttentionBackend.auto, CUDA, BF16, 64)[1].endswith("9.x, this one has 10.0")
    with pytest.raises(UserError, match=r"^model.attention=flash3 can't run here: it needs .*10\.0; use auto$"):
        resolve_attention(AttentionBackend.flash3, CUDA, BF16, 64)


@pytest.mark.usefixtures("hopper")
def test_auto_takes_it_after_one_comparison(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    find = flash3.find_flash3_fault
    monkeypatch.setattr(flash3, "find_flash3_fault", lambda _, dtype, head_dim: find(CPU, dtype, head_dim))
    for _ in range(2):
        assert resolve_attention(AttentionBackend.auto, CUDA, BF16, 64) == (
            AttentionBackend.flash3,
            "the fastest that runs here",
        )
    assert len(kernels.passes) == 4
    kernels.extra_keys = 1
    backend, reason = resolve_attention(AttentionBackend.auto, CUDA, BF16, 128)
    assert backend is AttentionBackend.varlen
    assert "flash3: with a window it is wrong by" in reason
