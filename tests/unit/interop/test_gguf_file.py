"""GGUF: what gguf's own reader finds in the file, what is refused, llama.cpp's greedy text where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe.checkpoint.reader import read_model, resolve
from moe.config import ExportConfig, ExportDtype, ExportFormat
from moe.config.generate import Sampling
from moe.data.tokenizer import load_saved
from moe.errors import UserError
from moe.inference.generate import generate
from moe.interop.exporting import run_export
from moe.interop.gguf_file import FILE, check_gguf
from moe.interop.hub_folder import HubFolder
from moe.interop.importing import import_model
from tests.unit.interop.made import hub_folder, hub_model, small_tokenizer
from tests.unit.interop.test_hub_tokenizer import REFUSED as TOKENIZERS_REFUSED

gguf = pytest.importorskip("gguf")


def exported(tmp_path: Path, family: str, dtype: ExportDtype = ExportDtype.stored, **settings: Any) -> Path:
    """A GGUF file of transformers' model of the family, with all its vocabulary's rows named by the tokenizer."""
    vocab = {"vocab_size": small_tokenizer().vocab_size}
    import_model(hub_folder(tmp_path / "hub", family, **vocab | settings), tmp_path / "run")
    config = ExportConfig(
        checkpoint=str(tmp_path / "run"), path=str(tmp_path / "gguf"), format=ExportFormat.gguf, dtype=dtype
    )
    assert "model.gguf" in run_export(config, pytest.fail)
    return tmp_path / "gguf" / FILE


def _value(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


SUPPORTED = [
    ("mistral", "llama", {"sliding_window": 96, "tie_word_embeddings": True}),
    ("mixtral", "llama", {"num_key_value_heads": 3}),
    ("olmoe", "olmoe", {"num_key_value_heads": 3, "tie_word_embeddings": True}),
    ("qwen3_moe", "qwen3moe", {"norm_topk_prob": True}),
    ("qwen3", "qwen3", {}),
]


@pytest.mark.parametrize(("family", "architecture", "settings"), SUPPORTED)
def test_what_the_reader_finds(family: str, architecture: str, settings: dict[str, Any], tmp_path: Path) -> None:
    reader = gguf.GGUFReader(exported(tmp_path, family, **settings))
    theirs = hub_model(family, **{"vocab_size": small_tokenizer().vocab_size} | settings)
    config, state = theirs.config, theirs.state_dict()
    assert _value(reader, "general.architecture") == architecture
    for key, name in (
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("vocab_size", "vocab_size"),
    ):
        assert _value(reader, f"{architecture}.{key}") == getattr(config, name)
    assert _value(reader, f"{architecture}.rope.freq_base") == pytest.approx(config.rope_parameters["rope_theta"])
    tensors = {one.name: one.data for one in reader.tensors}
    expected_names = {
        gguf.TENSOR_NAMES[one].format(bid=block)
        for one in gguf.MODEL_TENSORS[gguf.MODEL_ARCH[architecture.upper()]]
        for block in range(3)
    }
    assert {name.removesuffix(".weight") for name in tensors} <= expected_names
    assert ("output.weight" in tensors) is (family == "olmoe" or not config.tie_word_embeddings)

    def same(name: str, tensor: torch.Tensor) -> None:
        assert np.array_equal(tensors[name], tensor.numpy()), name

    same("token_embd.weight", state["model.embed_tokens.weight"])
    same("output_norm.weight", state["model.norm.weight"])
    same("blk.1.attn_v.weight", state["model.layers.1.self_attn.v_proj.weight"])
    key = state["model.layers.1.self_attn.k_proj.weight"]
    if architecture == "llama":  # as llama.cpp's converter permutes
        heads = config.num_key_value_heads
        key = key.reshape(heads, 2, key.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(key.shape)
    same("blk.1.attn_k.weight", key)
    if "num_experts_per_tok" in config.to_dict():
        gate_up = state["model.layers.1.mlp.experts.gate_up_proj"]
        same("blk.1.ffn_gate_exps.weight", gate_up.chunk(2, 1)[0])
        same("blk.1.ffn_up_exps.weight", gate_up.chunk(2, 1)[1])
        same("blk.1.ffn_down_exps.weight", state["model.layers.1.mlp.experts.down_proj"])
        same("blk.1.ffn_gate_inp.weight", state["model.layers.1.mlp.gate.weight"])
        assert _value(reader, f"{architecture}.expert_used_count") == config.num_experts_per_tok
    else:
        same("blk.1.ffn_down.weight", state["model.layers.1.mlp.down_proj.weight"])
    own = small_tokenizer()
    assert _value(reader, "tokenizer.ggml.model") == "llama"
    assert _value(reader, "tokenizer.ggml.add_space_prefix") is False
    assert (_value(reader, "tokenizer.ggml.bos_token_id"), _value(reader, "tokenizer.ggml.eos_token_id")) == (1, 2)
    assert len(_value(reader, "tokenizer.ggml.tokens")) == own.vocab_size


def test_dtypes_and_rows_without_a_piece(tmp_path: Path) -> None:
    """Matrices in bfloat16, norms and routers in float32; rows above the tokenizer's pieces are named as unused."""
    reader = gguf.GGUFReader(exported(tmp_path, "mixtral", ExportDtype.bfloat16, vocab_size=512))
    kinds = {one.name: one.tensor_type.name for one in reader.tensors}
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_gate_inp"):
        assert kinds[f"{name}.weight"] == "F32"
    for name in ("token_embd", "blk.0.attn_q", "blk.2.ffn_up_exps"):
        assert kinds[f"{name}.weight"] == "BF16"
    assert _value(reader, "tokenizer.ggml.tokens")[-1] == "[PAD511]"
    assert _value(reader, "tokenizer.ggml.token_type")[-1] == 5
    down = next(one for one in reader.tensors if one.name == "blk.1.ffn_down_exps.weight")
    expected = hub_model("mixtral").state_dict()["model.layers.1.mlp.experts.down_proj"].bfloat16()
    assert np.array_equal(
        down.data.view(np.int16), expected.view(torch.int16).numpy().reshape(down.data.view(np.int16).shape)
    )


REFUSED = [
    ("mistral", {"sliding_window": 95}, "model.sliding_window=95 must be null or ≥ model.max_position_embeddings=96"),
    ("olmoe", {}, "model.num_key_value_heads=1 must be model.num_attention_heads=3"),
    ("olmoe", {"num_key_value_heads": 3, "norm_topk_prob": True}, "router.norm_topk_prob=true must be false"),
    ("qwen3_moe", {}, "router.norm_topk_prob=false must be true"),
    ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}, "model.sparse_layers=[1, 2] must be all"),
    (
        "mistral",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        "model.rope_scaling.rope_type=yarn must not be set",
    ),
]


@pytest.mark.parametrize(("family", "settings", "text"), REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, settings: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="format=gguf: ") as caught:
        exported(tmp_path, family, **settings)
    assert text in str(caught.value)
    assert not list(tmp_path.glob("gguf*"))


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", "mistral")
    hub = HubFolder(folder)
    for make, text in TOKENIZERS_REFUSED:
        with pytest.raises(UserError, match="can't be written for other programs with the same ids") as caught:
            check_gguf(hub.family, hub.model, hub.router, make())
        assert text in str(caught.value)


def test_a_tokenizer_json_is_refused(tmp_path: Path) -> None:
    import_model(hub_folder(tmp_path / "hub", "mistral"), tmp_path / "run")
    run_export(ExportConfig(checkpoint=str(tmp_path / "run"), path=str(tmp_path / "again")), pytest.fail)
    import_model(tmp_path / "again", tmp_path / "run2")
    with pytest.raises(UserError, match=r"the tokenizer is a tokenizer\.json: only SentencePiece models"):
        run_export(
            ExportConfig(checkpoint=str(tmp_path / "run2"), path=str(tmp_path / "g"), format=ExportFormat.gguf), print
        )


@pytest.mark.parametrize(("family", "architecture", "settings"), SUPPORTED)
def test_llama_cpp_writes_the_same_text(
    family: str, architecture: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    del architecture
    path = exported(tmp_path, family, **settings)
    # Keys and values in float32 too, so that only the order of sums differs.
    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=False, verbose=False, type_k=0, type_v=0, n_threads=1)
    run = resolve(tmp_path / "run")
    own = load_saved(run / "tokenizer")
    for prompt in ("def load(", "  12 34  =", "é 東京"):
        ids = model.tokenize(prompt.encode(), add_bos=True, special=False)
        assert ids == [own.bos_id, *own.encode(prompt)]
        made: list[int] = []
        for token in model.generate(ids, temp=0.0, top_k=1, reset=True):
            if token == own.eos_id or len(made) == 24:
                break
            made.append(token)
        text = generate(read_model(run), own, [prompt], Sampling(max_new_tokens=24, temperature=0))[0]
        assert own.decode([*ids[1:], *made])[len(own.decode(ids[1:])) :] == text
