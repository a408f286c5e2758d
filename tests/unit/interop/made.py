"""Small Hugging Face folders with random weights, made by transformers."""

from __future__ import annotations

import inspect
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from moe.config import TokenizerConfig
from moe.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moe.data.tokenizer import open_tokenizer
from moe.data.tokenizer_training import train_sentencepiece

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB = 512
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 96,
    "initializer_range": 0.25,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": None}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "llama": ("Llama", {}),
    # A padding row of the embedding has no gradient there.
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "pad_token_id": None}),
    "qwen3": ("Qwen3", {"head_dim": 10}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "head_dim": 10},
    ),
}


def hub_model(family: str, **settings: Any) -> Any:
    """transformers' model of the family with random weights; norms are not 1, which would hide a missing one."""
    name, own = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SHAPE | own | settings, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    return model


def hub_folder(folder: Path, family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Such a model, saved, with a small tokenizer of ours."""
    save = {name: settings.pop(name) for name in ("max_shard_size", "save_original_format") if name in settings}
    hub_model(family, **settings).to(dtype).save_pretrained(folder, **save)
    (folder / "tokenizer.model").write_bytes(small_tokenizer().files()["tokenizer.model"])
    return folder


@cache
def small_tokenizer() -> SentencePieceTokenizer:
    """One that is trained here: no space before a text, digits apart."""
    text = inspect.getsource(json) + inspect.getsource(shutil)
    return train_sentencepiece([text], 500, print)


def mistral_model() -> bytes:
    """Mistral's own: a space before a text, runs of spaces."""
    return open_tokenizer(TokenizerConfig()).files()["tokenizer.model"]


def bytes_of(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """{tensor: (dtype, shape, its bytes)} of a folder's safetensors files, read by the safetensors package."""
    found: dict[str, tuple[str, list[int], bytes]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor: Tensor = file.get_tensor(name)
                assert name not in found
                content = tensor.view(torch.uint8 if tensor.dtype.itemsize == 1 else torch.int16).numpy().tobytes()
                found[name] = (str(tensor.dtype), list(tensor.shape), content)
    return found


def tokens(batch: int, length: int, vocab: int = VOCAB) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, vocab, (batch, length)))


def assert_logits_equal(ours: Tensor, theirs: Tensor) -> None:
    """The bound of docs/interop.md."""
    bound = 1e-5 * max(1.0, theirs.abs().max().item())
    assert (ours - theirs).abs().max().item() <= bound


def edit_json(path: Path, **values: Any) -> None:
    """Sets keys of a JSON object; `...` removes one."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))
