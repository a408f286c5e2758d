"""Import: equal logits, every layout on disk, and one line for every folder that can't be read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe.checkpoint.reader import read_model, resolve
from moe.config import ImportConfig, Mlp
from moe.data.tokenizer import load_saved
from moe.durable import UNFINISHED
from moe.errors import UserError
from moe.interop.families import FAMILIES
from moe.interop.hub_config import HubConfig
from moe.interop.hub_folder import INDEX, SINGLE, HubFolder
from moe.interop.importing import import_model, read_hf_config, read_hf_tokenizer, run_import
from tests.unit.interop.made import (
    assert_logits_equal,
    bytes_of,
    copied,
    edit_json,
    hub_folder,
    hub_model,
    tokens,
    transformers,
)

ROPE = {"rope_theta": 5e5, "rope_type": "default"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
CASES = [
    ("mistral", {}),
    ("mistral", {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 6, "tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 7, "rms_norm_eps": 1e-3}),
    ("mixtral", {}),
    ("mixtral", {"sliding_window": 9, "head_dim": 10, "num_local_experts": 3, "num_experts_per_tok": 3}),
    ("mixtral", {"tie_word_embeddings": True, "num_key_value_heads": 3, "rope_parameters": ROPE}),
    ("llama", {"rope_parameters": ROPE | LLAMA3, "head_dim": 12}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": None, "rope_parameters": ROPE | YARN}),
    ("mixtral", {"head_dim": 8, "rope_parameters": ROPE | YARN}),
    ("olmoe", {}),
    ("olmoe", {"norm_topk_prob": True, "num_key_value_heads": 3, "num_attention_heads": 6}),
    ("qwen3_moe", {}),
    (
        "qwen3_moe",
        {
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "num_key_value_heads": 3,
            "head_dim": 14,
        },
    ),
    ("qwen3_moe", {"decoder_sparse_step": 2}),
    ("qwen3_moe", {"mlp_only_layers": [0], "norm_topk_prob": True}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}),
]


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_equals_transformers(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", family, max_shard_size="40KB", **settings)
    assert (folder / INDEX).exists()
    import_model(folder, tmp_path / "run")
    model = read_model(resolve(tmp_path / "run"))
    ids = tokens(2, 40)
    with torch.no_grad():
        ours, theirs = model(ids).logits_BSV, hub_model(family, **settings)(ids).logits
    assert ours is not None
    assert_logits_equal(ours, theirs)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mixtral", {"head_dim": 8, "rope_parameters": ROPE | YARN}),
        ("llama", {"rope_parameters": ROPE | LLAMA3}),
        ("olmoe", {"num_key_value_heads": 3}),
        ("qwen3_moe", {"norm_topk_prob": True, "head_dim": 14, "mlp_only_layers": [1]}),
    ],
)
def test_gradients_equal_transformers(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    import_model(hub_folder(tmp_path / "hub", family, **settings), tmp_path / "run")
    model, theirs, ids = read_model(resolve(tmp_path / "run")).train(), hub_model(family, **settings), tokens(2, 40)
    labels = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), 1)
    loss = model(ids, labels_BS=labels).lm_loss_sum
    assert loss is not None
    (loss / (labels != -100).sum()).backward()
    theirs(ids, labels=ids).loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = gradients[name].grad
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max()), msg=name)


@pytest.mark.parametrize("save_original_format", [True, False])
def test_both_layouts_of_experts(save_original_format: bool, tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", "mixtral", save_original_format=save_original_format)
    names = bytes_of(folder).keys()
    assert ("model.layers.0.mlp.experts.gate_up_proj" in names) is not save_original_format
    state = hub_model("mixtral").state_dict()
    source = HubFolder(folder)
    for name, info in source.infos().items():
        assert torch.equal(source.read(name), state[name])
        if ".experts." in name:
            assert all(torch.equal(source.read(name, e), state[name][e]) for e in range(info.shape[0]))


def test_one_expert(tmp_path: Path) -> None:
    """A stack of one, which a part's shape alone doesn't tell from a whole tensor. Its weight is 1 only if normalised,
    which our configuration refuses: it could not train the router."""
    folder = hub_folder(tmp_path / "hub", "mixtral", num_local_experts=1, num_experts_per_tok=1)
    source, state = HubFolder(folder), hub_model("mixtral", num_local_experts=1, num_experts_per_tok=1).state_dict()
    for name in source.infos():
        assert torch.equal(source.read(name), state[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    import_model(hub_folder(tmp_path / "hub", "mixtral", dtype), tmp_path / "run")
    stored = bytes_of(tmp_path / "run" / "model")
    assert {one[0] for one in stored.values()} == {str(dtype)}


def test_what_config_json_says(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", "mixtral", sliding_window=11, router_aux_loss_coef=0.03)
    model, router = read_hf_config(folder)
    assert (model.mlp, model.sliding_window, model.num_key_value_heads) == (Mlp.sparse, 11, 1)
    assert (router.num_experts, router.top_k, router.aux_loss_coef) == (5, 2, 0.03)  # type: ignore[attr-defined]
    old = {"rope_parameters": ..., "rope_theta": 77.0, "rope_scaling": None}
    edit_json(folder / "config.json", **old)
    assert read_hf_config(folder)[0].rope_theta == 77.0


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_transformers(family: str, tmp_path: Path) -> None:
    """A config.json that leaves keys out means what transformers' class means."""
    theirs = getattr(transformers, FAMILIES[family].architecture.replace("ForCausalLM", "Config"))()
    one = FAMILIES[family]
    model, router = one.read(one, HubConfig(tmp_path, {"model_type": family}))
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "sliding_window", "tie_word_embeddings",
    ):  # fmt: skip
        assert getattr(model, name) == getattr(theirs, name, None), name
    assert model.head_size == getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert model.rope_theta == theirs.rope_parameters["rope_theta"]
    if model.mlp is Mlp.sparse:
        assert router.num_experts == theirs.num_experts
        for ours, name in (("top_k", "num_experts_per_tok"), ("aux_loss_coef", "router_aux_loss_coef")):
            assert getattr(router, ours) == getattr(theirs, name)
        assert getattr(router, "norm_topk_prob", None) == getattr(theirs, "norm_topk_prob", True)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_folder(tmp_path_factory.mktemp("sharded") / "hub", "mixtral", max_shard_size="60KB")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_folder(tmp_path_factory.mktemp("whole") / "hub", "mistral")


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _index(change: Callable[[dict[str, str], Path], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"], folder)
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def _outside(path: str) -> Callable[[Path], None]:
    return _index(lambda weights, folder: weights.update({"lm_head.weight": path.format(folder)}))


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE)

    return apply


def _truncated(folder: Path) -> None:
    path = _shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-10])


def _pickle(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _fifo(folder: Path) -> None:
    path = _shards(folder)[1]
    path.unlink()
    os.mkfifo(path)


def _written(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


def _header(raw: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / SINGLE).write_bytes(len(raw).to_bytes(8, "little") + raw)


BAD_SHARDS: list[tuple[str, Callable[[Path], None], list[str]]] = [
    ("parent", _outside("../other.safetensors"), [INDEX, "lm_head.weight", "must be a .safetensors file of this"]),
    ("absolute", _outside("{}/x/model.safetensors"), ["must be a .safetensors file of this folder"]),
    ("other_suffix", _outside("config.json"), ["must be a .safetensors file of this folder"]),
    ("number", _index(lambda w, f: w.update({"lm_head.weight": 3})), ["lm_head.weight=3 must be text"]),  # type: ignore[dict-item]
    ("no_shard", lambda folder: _shards(folder)[0].unlink(), ["00001-of-", "is missing"]),
    ("truncated", _truncated, ["00002-of-", "not copied to its end"]),
    ("not_in_it", _index(lambda w, f: w.update(extra=_shards(f)[0].name)), ['"extra" is not in it']),
    ("unlisted", _index(lambda w, f: w.pop("model.norm.weight")), ['"model.norm.weight" is in it, but not in']),
    ("fifo", _fifo, ["00002-of-", "must be a regular file, not a FIFO"]),
]  # fmt: skip
BAD_FILES: list[tuple[str, Callable[[Path], None], list[str]]] = [
    ("missing", _tensors(lambda t: t.pop("model.norm.weight")), ["model.norm.weight is missing"]),
    ("extra", _tensors(lambda t: t.update(other=torch.ones(2))), ['"other" is no tensor of a MistralForCausalLM']),
    ("shape", _tensors(lambda t: t.update({"model.norm.weight": torch.ones(23)})), ["is [23], and config"]),
    ("dtype", _tensors(lambda t: t.update({"model.norm.weight": torch.ones(24).char()})), ["is int8: weights must be"]),
    ("double", _tensors(lambda t: t.update({"model.norm.weight": torch.ones(24).double()})), ["is float64"]),
    ("pickle", _pickle, ["pytorch_model.bin, a pickle", "save_pretrained"]),
    ("empty", lambda folder: (folder / SINGLE).unlink(), ["holds neither model.safetensors nor"]),
    ("no_header", lambda folder: (folder / SINGLE).write_bytes(b"abc"), ["it is no safetensors file"]),
    ("long_header", lambda folder: (folder / SINGLE).write_bytes(b"\xff" * 64), ["its header would take"]),
    ("no_json", _header(b"{"), ["not valid JSON"]),
    ("list", _header(b"[]"), ["must be a JSON object"]),
    ("twice", _header(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}'), ["a name is there twice"]),
    ("deep", _header(b"[" * 5000), ["not valid JSON"]),
    ("overlap", _header(b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[-9,0]}}'), ["data_offsets=[-9, 0] must be"]),
    ("too_long", _header(b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}'), ["its header says"]),
    ("unknown_dtype", _header(b'{"a":{"dtype":"F4","shape":[0],"data_offsets":[0,0]}}'), ['dtype="F4" must be one of']),
    ("no_config", lambda folder: (folder / "config.json").unlink(), ["config.json", "No such file"]),
    ("many_layers", lambda f: edit_json(f / "config.json", num_hidden_layers=10**9), ["the files hold 3 layers"]),
    ("text", lambda f: edit_json(f / "config.json", hidden_size="24"), ['hidden_size="24" must be a whole number']),
    ("no_tokenizer", lambda f: (f / "tokenizer.model").unlink(), ["neither tokenizer.json nor tokenizer.model"]),
    ("other", lambda f: edit_json(f / "config.json", model_type="gpt2"), ['model_type="gpt2" is another architecture']),
    ("class", lambda f: edit_json(f / "config.json", architectures=["MistralModel"]), ["MistralModel", "another"]),
    (
        "huge",
        lambda f: edit_json(f / "config.json", num_attention_heads=10**9, num_key_value_heads=10**9, head_dim=10**9),
        ["config.json: its sizes make a tensor larger than any can be"],
    ),
    ("added", lambda f: _written(f, "added_tokens.json", '{"<|im_end|>": 500}'), ["lacks <|im_end|> of added_tokens"]),
    ("end", lambda f: _written(f, "tokenizer_config.json", '{"eos_token": "<s>"}'), ["eos_token=<s> is not the end"]),
    ("deep_names", lambda f: _written(f, "tokenizer_config.json", "[" * 100_000), ["tokenizer_config.json: broken"]),
]  # fmt: skip


def _refused(folder: Path, destination: Path, texts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        import_model(folder, destination)
    for text in texts:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(destination.parent.glob(f"{destination.name}*"))


@pytest.mark.parametrize(("damage", "texts"), [row[1:] for row in BAD_SHARDS], ids=[row[0] for row in BAD_SHARDS])
def test_damaged_shards(damage: Callable[[Path], None], texts: list[str], sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path / "hub")
    damage(folder)
    _refused(folder, tmp_path / "run", texts)


@pytest.mark.parametrize(("damage", "texts"), [row[1:] for row in BAD_FILES], ids=[row[0] for row in BAD_FILES])
def test_damaged_files(damage: Callable[[Path], None], texts: list[str], whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "hub")
    damage(folder)
    _refused(folder, tmp_path / "run", texts)


UNSUPPORTED: list[dict[str, Any]] = [
    {"hidden_act": "gelu"},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"attention_dropout": 0.1},
    {"quantization_config": {"bits": 4}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "other": 1}},
    {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    {"auto_map": {"AutoModelForCausalLM": "modeling.Other"}},
    {"partial_rotary_factor": 0.5},
    {"is_encoder_decoder": True},
    {"head_dim": 7},
    {"rope_scaling": {"type": "yarn", "factor": 0.5}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "rope_theta": 1e4}},
    {"sliding_window": 0},
    {"use_sliding_window": False, "sliding_window": 6},  # transformers' Mistral has a window nevertheless
]


@pytest.mark.parametrize("values", UNSUPPORTED, ids=lambda values: next(iter(values)))
def test_unsupported_keys_are_named(values: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "hub")
    edit_json(folder / "config.json", **values)
    _refused(folder, tmp_path / "run", [str(folder / "config.json"), next(iter(values))])


def test_unknown_keys(whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "hub")
    edit_json(folder / "config.json", some_trainer_version="1", nothing=None)
    _refused(folder, tmp_path / "run", ["some_trainer_version", "ignore_keys=[some_trainer_version]"])
    import_model(folder, tmp_path / "run", ignore_keys=["some_trainer_version"])
    resolve(tmp_path / "run")


def test_a_destination_that_exists(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=r"run_dir=.*there exists: name a new folder"):
        import_model(whole, tmp_path / "there")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists"):
        import_model(whole, tmp_path / "link")
    # What an interrupted import left is removed, a link in its place is not followed.
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    (tmp_path / "run.partial").symlink_to(tmp_path / "kept")
    import_model(whole, tmp_path / "run")
    assert (tmp_path / "kept" / "file").read_text() == "kept"
    assert not (tmp_path / "run.partial").exists()


def test_a_folder_of_the_users_is_not_removed(whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "run.partial")
    with pytest.raises(UserError, match=r"run_dir=.*run: .*run\.partial is in the way: remove it if"):
        import_model(folder, tmp_path / "run")
    assert (folder / SINGLE).stat().st_size == (whole / SINGLE).stat().st_size
    _written(folder, UNFINISHED, "")  # as in one that an interrupted import left
    import_model(whole, tmp_path / "run")
    assert not folder.exists()
    assert not (tmp_path / "run" / UNFINISHED).exists()


def test_a_sentencepiece_model_has_the_folders_chat_template(whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "hub")
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    several = [{"name": [], "template": "x"}, {"name": "default", "template": template}]
    _written(folder, "tokenizer_config.json", json.dumps({"chat_template": several, "eos_token": {"content": "</s>"}}))
    assert read_hf_tokenizer(folder).chat_template == template
    _written(folder, "chat_template.jinja", "{{ bos_token }}" + template)
    _written(folder, "added_tokens.json", '{"<unk>": 0, "<s>": 1, "</s>": 2}')  # as older models have it
    import_model(folder, tmp_path / "run")
    assert load_saved(tmp_path / "run" / "tokenizer").chat_template == "{{ bos_token }}" + template


def test_other_ends_of_a_text_are_named(whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "hub")
    for number, (stated, said) in enumerate(((2, ""), ([2, 7, 9], "ends texts at 7, 9 too"), ("x", ""))):
        _written(folder, "generation_config.json", json.dumps({"eos_token_id": stated}))
        run = tmp_path / f"run{number}"
        message = run_import(ImportConfig(checkpoint=str(folder), run_dir=str(run)))
        assert said in message
        assert ("generation_config.json" in message) == bool(said)


def test_a_checkpoint_is_not_imported_again(whole: Path, tmp_path: Path) -> None:
    import_model(whole, tmp_path / "run")
    _refused(tmp_path / "run", tmp_path / "run2", ["run: is a checkpoint already"])


def test_the_hubs_cache_has_links(whole: Path, tmp_path: Path) -> None:
    blobs, folder = copied(whole, tmp_path / "blobs"), tmp_path / "snapshot"
    folder.mkdir()
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(path)
    import_model(folder, tmp_path / "run")
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("/dev/zero")
    _refused(folder, tmp_path / "run2", ["must be a regular file, not a device"])


def test_a_tied_head_that_differs(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", "mistral", tie_word_embeddings=True)
    tensors = load_file(folder / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / SINGLE)
    import_model(folder, tmp_path / "run")
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, folder / SINGLE)
    _refused(folder, tmp_path / "run2", ["lm_head.weight differs", "tie_word_embeddings"])


def test_a_model_trained_with_other_back_ends_runs_here(tmp_path: Path) -> None:
    import_model(hub_folder(tmp_path / "hub", "mixtral"), tmp_path / "run")
    folder, ids = resolve(tmp_path / "run"), tokens(2, 40)
    expected = read_model(folder)(ids)
    config = folder / "config.yaml"
    named = (
        config.read_text()
        .replace("backend: auto", "backend: megablocks")
        .replace("attention: auto", "attention: varlen")
    )
    assert "megablocks" in named and "varlen" in named  # noqa: PT018
    config.write_text(named)
    torch.testing.assert_close(read_model(folder)(ids).logits_BSV, expected.logits_BSV, rtol=0, atol=0)


def test_a_folder_that_must_be_imported_first_is_said(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", "mixtral")
    with pytest.raises(
        UserError, match=r"no checkpoint there; a Hugging Face folder: `moe import checkpoint=.*/hub run_dir"
    ):
        resolve(folder)
