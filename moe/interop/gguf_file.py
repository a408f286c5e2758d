"""`moe export format=gguf`: the file that llama.cpp and what is built on it read.

Its graphs are fixed by `general.architecture`: a model that they would compute otherwise is refused by the key that
they ignore. Names and layouts are those of llama.cpp's own converter; the extra `gguf` of this package writes the file.

Legend: N heads, D head dimension, E experts, F feed-forward, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.config import Config, ExportDtype, Mlp, ModelConfig, RouterConfig
from moe.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moe.data.tokenizer_base import Tokenizer
from moe.errors import UserError
from moe.interop.families import Family
from moe.interop.gguf_vocabulary import add_vocabulary
from moe.interop.hub_tokenizer import MODEL_FILE, check_sentencepiece
from moe.interop.tensor_files import TensorInfo
from moe.interop.tensor_source import TensorSource, is_stacked

FILE = "model.gguf"
ARCHITECTURES = {  # family → general.architecture
    "mistral": "llama", "llama": "llama", "mixtral": "llama", "olmoe": "olmoe", "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}  # fmt: skip
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the file, and what `pieces` of ours make it, one after the other."""

    name: str
    info: TensorInfo
    pieces: Callable[[TensorSource], Iterator[Tensor]]


def check_gguf(family: Family, model: ModelConfig, router: RouterConfig, tokenizer: Tokenizer) -> None:
    """Raises UserError naming the key where llama.cpp would compute another model without saying so."""
    window, positions = model.sliding_window, model.max_position_embeddings
    _require(
        window is None or window >= positions,
        f"model.sliding_window={window} must be null or ≥ model.max_position_embeddings={positions}: llama.cpp's "
        f"{family.model_type} attends to all tokens",
    )
    _require(
        not model.rope_scaling,
        f"model.rope_scaling.rope_type={model.rope_scaling.get('rope_type')} must not be set: scaled positions are not "
        "written; llama.cpp's convert_hf_to_gguf.py on the exported folder does",
    )
    if model.mlp is Mlp.sparse:
        layers = len(model.sparse_layer_numbers)
        _require(layers == model.num_hidden_layers, f"model.sparse_layers={model.sparse_layers} must be all")
        norm, needed = getattr(router, "norm_topk_prob", None), family.model_type != "olmoe"
        _require(
            norm is needed,
            f"router.norm_topk_prob={str(norm).lower()} must be {str(needed).lower()}: llama.cpp's {family.model_type} "
            "knows no other",
        )
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    _require(
        family.model_type != "olmoe" or heads == groups,
        f"model.num_key_value_heads={groups} must be model.num_attention_heads={heads}: llama.cpp's olmoe doesn't load "
        "with fewer",
    )
    _require(
        isinstance(tokenizer, SentencePieceTokenizer),
        "the tokenizer is a tokenizer.json: only SentencePiece models are written; llama.cpp's convert_hf_to_gguf.py "
        "on the exported folder may know this one",
    )
    check_sentencepiece(tokenizer.files()[MODEL_FILE])


def gguf_tensors(
    family: Family, model: ModelConfig, infos: dict[str, TensorInfo], dtype: ExportDtype
) -> list[GgufTensor]:
    """Every tensor of the file, in the model's order. Norms and routers are float32, as llama.cpp has them."""
    found = []
    for name, info in infos.items():
        kept = info.dtype if dtype is ExportDtype.stored else getattr(torch, dtype.name)
        found += _written(family, model, name, TensorInfo(kept, info.shape))
    if model.tie_word_embeddings and family.model_type == "olmoe":  # its graph needs a head of its own
        embedding = next(one for one in found if one.name == "token_embd.weight")
        found.append(GgufTensor("output.weight", embedding.info, embedding.pieces))
    return found


def _written(family: Family, model: ModelConfig, name: str, info: TensorInfo) -> Iterator[GgufTensor]:
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+?)(?:\.weight)?", name)
    if layer is None:
        yield GgufTensor(f"{_WHOLE[name.removesuffix('.weight')]}.weight", _widened(info), _plain(name))
        return
    block, inner = f"blk.{layer[1]}", layer[2]
    if is_stacked(name):
        yield from _experts(block, name, info)
        return
    pieces = _plain(name)
    if family.model_type in ("mistral", "llama", "mixtral") and inner in ("self_attn.q_proj", "self_attn.k_proj"):
        pieces = _interleaved(name, model.head_size)
    kept = TensorInfo(torch.float32, info.shape) if inner == "mlp.gate" else _widened(info)
    yield GgufTensor(f"{block}.{_IN_LAYER[inner]}.weight", kept, pieces)


def _widened(info: TensorInfo) -> TensorInfo:
    """Vectors (norms) are float32."""
    return TensorInfo(torch.float32, info.shape) if len(info.shape) == 1 else info


def _plain(name: str) -> Callable[[TensorSource], Iterator[Tensor]]:
    return lambda source: iter([source.read(name)])


def _interleaved(name: str, head_dim: int) -> Callable[[TensorSource], Iterator[Tensor]]:
    """llama.cpp's llama rotates dimensions 2i and 2i + 1 of a head, not i and i + D/2: rows [N, 2, D/2] become
    [N, D/2, 2]."""

    def pieces(source: TensorSource) -> Iterator[Tensor]:
        weight = source.read(name)
        yield weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)

    return pieces


def _experts(block: str, name: str, info: TensorInfo) -> Iterator[GgufTensor]:
    """gate_up_proj [E, 2F, H] as two tensors [E, F, H]; down_proj [E, H, F] as it is."""
    experts, rows, columns = info.shape
    if name.endswith("down_proj"):
        yield GgufTensor(f"{block}.ffn_down_exps.weight", info, _slices(name, experts, 0, rows))
        return
    half = TensorInfo(info.dtype, (experts, rows // 2, columns))
    yield GgufTensor(f"{block}.ffn_gate_exps.weight", half, _slices(name, experts, 0, rows // 2))
    yield GgufTensor(f"{block}.ffn_up_exps.weight", half, _slices(name, experts, rows // 2, rows))


def _slices(name: str, experts: int, first: int, end: int) -> Callable[[TensorSource], Iterator[Tensor]]:
    return lambda source: (source.read(name, expert)[first:end] for expert in range(experts))


def write_gguf(
    path: Path, family: Family, config: Config, tokenizer: Tokenizer, source: TensorSource,
    tensors: list[GgufTensor], top_k: int,
) -> int:  # fmt: skip
    """Writes the new file `path`, one tensor (of stacked experts, one expert) at a time; returns its number of bytes.
    Raises UserError where the package `gguf` is missing, OSError."""
    gguf = require_gguf()
    model, architecture = config.model, ARCHITECTURES[family.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(path.parent.name.removesuffix(".partial"))
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_hidden_layers)
    sparse = model.mlp is Mlp.sparse
    writer.add_feed_forward_length(
        model.expert_size if sparse and architecture != "qwen3moe" else model.intermediate_size
    )
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    writer.add_key_length(model.head_size)
    writer.add_value_length(model.head_size)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_rope_dimension_count(model.head_size)
    writer.add_vocab_size(model.vocab_size)
    if sparse:
        writer.add_expert_count(config.router.num_experts)
        writer.add_expert_used_count(top_k)
        if architecture == "qwen3moe":
            writer.add_expert_feed_forward_length(model.expert_size)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    add_vocabulary(writer, tokenizer, model.vocab_size)
    kinds = {torch.float32: gguf.GGMLQuantizationType.F32, torch.float16: gguf.GGMLQuantizationType.F16}
    kinds[torch.bfloat16] = gguf.GGMLQuantizationType.BF16
    for tensor in tensors:
        words = np.dtype(np.float32 if tensor.info.dtype is torch.float32 else np.uint16)
        writer.add_tensor_info(tensor.name, tensor.info.shape, words, tensor.info.nbytes, kinds[tensor.info.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout
    for tensor in tensors:
        writer.write_padding(file, file.tell())
        for piece in tensor.pieces(source):
            file.write(piece.to(tensor.info.dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    writer.write_padding(file, file.tell())
    writer.close()
    return path.stat().st_size


def require_gguf() -> Any:
    """The package `gguf`. Raises UserError where it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("format=gguf needs the package gguf: pip install 'moe-train[gguf]'") from error
    return gguf


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(f"format=gguf: {message}")
