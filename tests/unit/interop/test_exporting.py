"""Export: every byte of an imported model, the same text in transformers, nothing half-done, bounded memory."""

from __future__ import annotations

import ctypes
import gc
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.checkpoint.model_writer import write_model
from moe.checkpoint.reader import read_model, resolve
from moe.checkpoint.state import TrainState
from moe.config import ExportConfig, ExportDtype, ExportFormat, Initializer, Mlp, ModelConfig, QkNorm, TopKRouterConfig
from moe.config.generate import Sampling
from moe.config.router import RouterConfig
from moe.errors import UserError
from moe.inference.generate import generate
from moe.interop.exporting import run_export
from moe.interop.families import family_for
from moe.interop.importing import import_model, model_config
from moe.interop.tensor_source import CheckpointTensors
from moe.model.build import build_model
from tests.ranks import run_ranks
from tests.unit.interop.made import (
    assert_logits_equal,
    bytes_of,
    hub_folder,
    small_tokenizer,
    tokens,
    transformers,
)


def export(run: Path, path: Path, **settings: Any) -> str:
    return run_export(ExportConfig(checkpoint=str(run), path=str(path), **settings), pytest.fail)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("family", "dtype", "settings"),
    [
        ("mistral", torch.float16, {"tie_word_embeddings": True}),
        ("mistral", torch.float32, {"sliding_window": 5}),
        ("mixtral", torch.bfloat16, {"head_dim": 10, "max_shard_size": "40KB"}),
        ("mixtral", torch.float32, {"save_original_format": False}),
        ("llama", torch.bfloat16, {"rope_parameters": LLAMA3}),
        ("olmoe", torch.bfloat16, {"rope_parameters": YARN}),
        ("qwen3_moe", torch.bfloat16, {"mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 9}),
        ("qwen3", torch.float16, {}),
    ],
)
def test_a_round_trip_keeps_every_byte(
    family: str, dtype: torch.dtype, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = hub_folder(tmp_path / "hub", family, dtype, **settings)
    import_model(folder, tmp_path / "run")
    wanted = family if family == "llama" else None  # without a window, the first that can say what it is is Mistral
    export(tmp_path / "run", tmp_path / "exported", max_shard_gb=5e-5, family=wanted)
    before, after = bytes_of(folder), bytes_of(tmp_path / "exported")
    if settings.get("save_original_format") is False:  # the export has the layout that transformers writes by default
        before = bytes_of(hub_folder(tmp_path / "per_expert", family, dtype))
    assert after == before
    index = json.loads((tmp_path / "exported" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(len(one[2]) for one in after.values())
    theirs, ours = (json.loads((one / "config.json").read_text()) for one in (folder, tmp_path / "exported"))
    for other in ("bos_token_id", "eos_token_id", "max_window_layers"):  # the tokenizer's; 0 where there is a window
        theirs.pop(other, None)
    stated = {key: value for key, value in theirs.items() if key in ours and value is not None}
    assert {key: ours[key] for key in stated} == stated
    opened = transformers.AutoConfig.from_pretrained(tmp_path / "exported")
    assert opened.rope_parameters == transformers.AutoConfig.from_pretrained(folder).rope_parameters
    assert ours["torch_dtype"] == str(dtype).removeprefix("torch.")


def trained_run(folder: Path, mlp: Mlp, router: RouterConfig | None = None, **settings: Any) -> Path:
    """A model folder of ours with random weights."""
    shape = {
        "vocab_size": small_tokenizer().vocab_size,
        "hidden_size": 24,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        **settings,
    }
    model = ModelConfig(
        mlp=mlp,
        intermediate_size=36,
        num_hidden_layers=2,
        initializer=Initializer.normal,
        initializer_range=0.3,
        **shape,
    )
    config = model_config(model, router or TopKRouterConfig(num_experts=3), folder)
    write_model(folder, build_model(config, torch.device("cpu")), small_tokenizer(), config, TrainState(step=3))
    return folder


@pytest.mark.parametrize(
    ("mlp", "settings"),
    [
        (Mlp.dense, {"sliding_window": 6}),
        (Mlp.dense, {"rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"}}),
        (Mlp.sparse, {"sliding_window": 6}),
        (Mlp.sparse, {"qk_norm": QkNorm.projection}),
        (Mlp.sparse, {"qk_norm": QkNorm.head, "head_dim": 10, "sliding_window": 6, "moe_intermediate_size": 20}),
        (Mlp.sparse, {"rope_scaling": {key: value for key, value in YARN.items() if key != "rope_theta"}}),
    ],
)
def test_greedy_text_is_the_same_in_transformers(mlp: Mlp, settings: dict[str, Any], tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run", mlp, **settings)
    export(run, tmp_path / "exported")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    model, own = read_model(resolve(run)), small_tokenizer()
    with torch.no_grad():
        assert_logits_equal(model(tokens(2, 20, 300)).logits_BSV, theirs(tokens(2, 20, 300)).logits)  # type: ignore[arg-type]
    prompt = "Once upon  a time 12"
    inputs = tokenizer(prompt, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == [own.bos_id, *own.encode(prompt)]
    made = theirs.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    made = made[: made.index(own.eos_id)] if own.eos_id in made else made
    assert len(set(made)) > 5  # it isn't one token for ever
    ids = own.encode(prompt)
    text = generate(model, own, [prompt], Sampling(max_new_tokens=24, temperature=0))[0]
    assert text == own.decode([*ids, *made])[len(own.decode(ids)) :]


def test_dtypes(tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run", Mlp.sparse)
    export(run, tmp_path / "half", dtype=ExportDtype.bfloat16)
    half, full = bytes_of(tmp_path / "half"), CheckpointTensors(run)
    assert {one[0] for one in half.values()} == {"torch.bfloat16"}
    expected = full.read("model.norm.weight").bfloat16().view(torch.int16).numpy().tobytes()
    assert half["model.norm.weight"][2] == expected


@pytest.mark.parametrize(
    ("model", "router", "text"),
    [
        ({"n_shared_experts": 1}, {}, "model.n_shared_experts=1 must be 0"),
        ({"sparse_layers": "every_2"}, {}, "model.sparse_layers=every_2 must be all"),
        ({}, {"norm_topk_prob": False}, "router.norm_topk_prob=false must be true"),
        ({}, {"routed_scaling_factor": 2.0}, "router.routed_scaling_factor=2.0 must be 1.0"),
        ({}, {"bias_update": "sign"}, "router.bias_update=sign must be none"),
        ({}, {"layers": {1: {"top_k": 1, "norm_topk_prob": False}}}, "router.layers.1 must be as the other layers"),
    ],
)
def test_what_no_family_can_say_is_named(model: dict[str, Any], router: dict[str, Any], text: str) -> None:
    from omegaconf import OmegaConf

    chosen: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TopKRouterConfig), router))
    with pytest.raises(UserError, match="can't be written as") as caught:
        family_for(ModelConfig(**model), chosen, 0, "mixtral")
    assert text in str(caught.value)
    with pytest.raises(UserError, match="family=bert must be one of mistral, "):
        family_for(ModelConfig(), TopKRouterConfig(), 0, "bert")


def test_the_value_of_a_scheduled_option_is_that_of_the_last_step() -> None:
    router = TopKRouterConfig(schedules={"top_k": {0: 4, 10: 2}})
    for step, top_k in ((0, 4), (10, 4), (11, 2)):
        assert family_for(ModelConfig(), router, step, None)[1]["num_experts_per_tok"] == top_k


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"format": ExportFormat.gguf, "max_shard_gb": 1.0}, "max_shard_gb=1.0 has no effect with format=gguf"),
        ({"format": ExportFormat.peft, "family": "llama"}, "family=llama has no effect with format=peft"),
        ({"format": ExportFormat.peft, "dtype": ExportDtype.float16}, "dtype=float16 has no effect with format=peft"),
        ({"max_shard_gb": 0.0}, "max_shard_gb=0.0 must be > 0"),
        ({"path": " "}, "path='' must name a new folder"),
    ],
)
def test_options(given: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=re.escape(text)):
        ExportConfig(**{"checkpoint": "a", "path": "b"} | given)


def test_the_model_card(tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run" / "checkpoints" / "step_00000003", Mlp.sparse).parents[1]
    rows = [
        {"step": 2, "val_loss": 3.0},
        {"step": 3, "lm_loss": 2.5, "max_violation": 0.5},
        {"step": 4, "lm_loss": 9.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lm')
    export(run, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for line in (
        "| val_loss | 3 |",
        "| lm_loss | 2.5 |",
        "| max_violation | 0.5 |",
        "- 3 steps, 0 tokens",
        "hidden_size: 24",
    ):
        assert line in card
    assert small_tokenizer().fingerprint in card
    import_model(tmp_path / "exported", tmp_path / "again")
    export(tmp_path / "again", tmp_path / "exported2")
    assert "Not trained here" in (tmp_path / "exported2" / "README.md").read_text()


def test_a_destination_that_exists(tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run", Mlp.dense)
    (tmp_path / "exported").mkdir()
    with pytest.raises(UserError, match=r"path=.*exported exists"):
        export(run, tmp_path / "exported")


def _with_small_files(run: Path, path: Path) -> str:
    """As on a disk that fills up."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    try:
        return export(run, path)
    except OSError as error:
        return f"OSError: {error.strerror}"


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run", Mlp.dense)
    (said,) = run_ranks(1, _with_small_files, run, tmp_path / "exported", timeout=60)
    assert said == "OSError: File too large"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


ALLOWANCE = 40 << 20  # bytes of memory beside the process's own


def _in_little_memory(folder: Path) -> int:
    """Imports and exports with a limit on what the process may allocate; bytes of the checkpoint."""
    import_model(folder / "warm", folder / "warm_run")  # loads what is imported late
    export(folder / "warm_run", folder / "warm_exported")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is freed already would be memory beside the limit
    status = Path("/proc/self/status").read_text()
    (used,) = (int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + ALLOWANCE, resource.RLIM_INFINITY))
    with pytest.raises(MemoryError):
        bytearray(2 * ALLOWANCE)
    import_model(folder / "hub", folder / "run")
    export(folder / "run", folder / "exported")
    return sum(path.stat().st_size for path in (folder / "hub").glob("*.safetensors"))


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """A checkpoint goes in and out with a fifth of its size of memory; its largest tensor, the embedding, has 8 MB, and
    a layer's stacked experts have 36."""
    hub_folder(tmp_path / "warm", "mixtral")
    shape = {"hidden_size": 128, "intermediate_size": 3072, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = {"num_local_experts": 24, "num_hidden_layers": 4, "max_shard_size": "100MB"}
    hub_folder(tmp_path / "hub", "mixtral", torch.bfloat16, **shape, **settings)
    # A process of its own: memory that earlier tests freed within this one could be used again, beside any limit.
    imports = "from pathlib import Path; import tests.unit.interop.test_exporting as test; "
    program = f"{imports}print(test._in_little_memory(Path({str(tmp_path)!r})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 5 * ALLOWANCE
    assert bytes_of(tmp_path / "exported") == bytes_of(tmp_path / "hub")
