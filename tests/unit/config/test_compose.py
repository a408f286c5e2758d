"""Every rule's error names key, value and rule; every preset composes and passes the rules; unknown keys are errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moe.config import Config, OptimizerKind, PlanConfig, PrepareConfig, ValidateConfig
from moe.config.compose import ConfigError, load_config, read_config, to_yaml
from moe.config.presets import choices
from moe.data.tokenizer import count_pieces
from moe.errors import UserError

BAD = [
    # (overrides, what the line must hold)
    (["router.top_k=9"], "router.top_k=9 must be ≤ router.num_experts=8"),
    (["router.topk=2"], "router.topk=2: no such key; did you mean router.top_k=2?"),
    (["+router.topk=2"], "router.topk=2: no such key; did you mean router.top_k=2?"),
    (["lr=1"], "lr=1: no such key; did you mean optim.lr=1?"),
    (["train.name=x"], "train.name=x: no such key; did you mean tracking.name=x?"),
    (["train.seq_length=8"], "train.seq_length=8: no such key; did you mean train.sequence_length=8?"),
    (["+model.heads.x=3"], "model.heads.x=3: no such key"),
    (["+foo=1"], "foo=1: no such key; `moe VERB --help` lists them all"),
    (["modle=tiny"], "modle=tiny: no such key; did you mean model=tiny?"),
    (["model=big"], "model=big must be one of mistral_7b, mixtral_8x22b, mixtral_8x7b, small, tiny"),
    (["model=mixtral_8x7"], "did you mean model=mixtral_8x7b?"),
    (["checkpoint=often"], "checkpoint=often: there is no preset often; checkpoint is set by its keys, checkpoint.ev"),
    (["model.hidden_size=abc"], "model.hidden_size=abc"),
    (["train.steps=1.5"], "train.steps=1.5"),
    (["train.steps=null"], "train.steps=null"),
    (["train.steps=0"], "train.steps=0 must be > 0"),
    (["model.mlp=foo"], "model.mlp=foo must be one of dense, sparse"),
    (["model.num_key_value_heads=3"], "model.num_attention_heads=4 must be divisible by model.num_key_value_heads=3"),
    (["model.head_dim=15"], "model.head_dim=15 must be even"),
    (["model.hidden_size=130"], "model.hidden_size=130 must be divisible by model.num_attention_heads=4"),
    (["model.sliding_window=0"], "model.sliding_window=0 must be ≥ 1"),
    (
        ["model.vocab_size=1000", "tokenizer.vocab_size=2000"],
        "tokenizer.vocab_size=2000 must be ≤ model.vocab_size=1000",
    ),
    (["tokenizer.vocab_size=100"], "tokenizer.vocab_size=100 must be ≥ 300"),
    (["tokenizer.path=x"], "tokenizer.path=x must be null for tokenizer.kind=sentencepiece"),
    (["tokenizer=model_file"], "tokenizer.path"),
    (["tokenizer=mistral"], "model.vocab_size must be stated"),  # without `count_pieces`
    (["tokenizer.vocab_size=-5"], "tokenizer.vocab_size=-5 must be > 0"),
    (
        ["parallel.zero_stage=0"],
        "parallel.zero_stage=0 must be 1 or 2: DeepSpeed's stage 0 reports a wrong gradient norm",
    ),
    (["parallel.zero_stage=3"], "parallel.zero_stage=3 must be 1 or 2: stage 3"),
    (["data=files"], "data.path"),
    (["data=stdlib", "data.path=x"], "data.path=x and data.sources can't both be set"),
    (["data.path="], "data.path='' is empty: give a value or leave the key out"),
    (["data=files", "data.path=' '"], "data.path=' ' is empty"),
    (["run_dir="], "run_dir='' is empty"),
    (["data.cache_dir="], "data.cache_dir='' is empty"),
    (["data.path=x", "data.text_field="], "data.text_field='' is empty"),
    (["data.sources.prose.path="], "data.sources.prose.path='' is empty"),
    (["+data.sources.prose.split="], "data.sources.prose.split='' is empty"),
    (["tokenizer=model_file", "tokenizer.path="], "tokenizer.path='' is empty"),
    (["tracking.project="], "tracking.project='' is empty"),
    (["tracking.name="], "tracking.name='' is empty"),
    (["~train"], "~train: only a source can be removed (~data.sources.NAME)"),
    (["~train.steps"], "~train.steps: only a source"),
    (["~tracking"], "~tracking: only a source"),
    (["~data"], "~data: only a source"),
    (["~run_dir"], "~run_dir: only a source"),
    (["~data.sources.prose.weight"], "~data.sources.prose.weight: only a source"),
    (["~data.sources.poetry"], "'data.sources.poetry' does not exist"),
    (["+data.sources.x.path=a"], "must be stated for every source or for none"),
    (["+data.sources.x.pth=a"], "data.sources.x.pth: no such key; did you mean data.sources.x.path?"),
    (["data.held_out=1"], "data.held_out=1.0 must be between 0 and 1"),
    (["data=sft", "data.path=x", "data.packing=best_fit"], "data.packing=best_fit is for documents only: leave it out"),
    (["data=sft", "data.path=x", "data.document_mask=false"], "data.document_mask=false is for documents only: leave"),
    (["optim.lr=nan"], "optim.lr=nan must be > 0"),
    (["optim.lr=1e300"], "optim.lr=1e+300 must be ≤ 1e+37: float32 has no larger numbers"),
    (["optim.max_grad_norm=inf"], "optim.max_grad_norm=inf must be ≤ 1e+37"),
    (["router.capacity_factor=1e308"], "router.capacity_factor=1e+308 must be ≤ 1e+37"),
    ([f"train.seed={2**64}"], f"train.seed={2**64} must be ≤ {2**64 - 1}"),
    (["train.seed=-1"], "train.seed=-1 must be ≥ 0"),
    ([f"train.steps={10**30}"], f"train.steps={10**30} must be ≤ 1000000000"),
    (["train.sample_tokens=40000"], "train.sample_tokens=40000 must be < model.max_position_embeddings=32768"),
    (["optim.betas=[0.9]"], "optim.betas=[0.9] must be two numbers"),
    (["optim.momentum=0.9"], "optim.momentum=0.9 needs optim=muon: AdamW's own are optim.betas"),
    (["optim=muon", "optim.momentum=1"], "optim.momentum=1.0 must be in [0, 1)"),
    (
        ["optim=muon", "adapter=lora", "init_from=x"],
        "optim=muon with adapter.kind=lora would leave Muon nothing to train",
    ),
    (["optim=muon", "parallel.offload_optimizer=true"], "set parallel.offload_optimizer=false, or optim=adamw"),
    (["optim.decay_steps=3"], "needs optim.schedule=warmup_stable_decay"),
    (["optim.warmup_steps=500"], "must be ≤ train.steps=300"),
    (["train.sequence_length=100000"], "must be ≤ model.max_position_embeddings=32768"),
    (["router.aux_loss_coef=-1"], "router.aux_loss_coef=-1.0 must be ≥ 0"),
    (["router.capacity_factor=0"], "router.capacity_factor=0.0 must be > 0"),
    (["data.path=null", "data=files"], "data.path=null must name a file, folder, glob or data set, as in data.path="),
    (["=3"], "=3: must be key=value"),
    (["model"], "model: must be key=value"),
]


@pytest.mark.parametrize(("overrides", "expected"), BAD, ids=lambda value: str(value)[:40])
def test_bad_configuration_is_one_line_with_key_value_and_rule(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    text = str(caught.value)
    assert expected in text
    assert len(text.splitlines()) == 1


def test_a_schedules_steps_are_held_against_those_of_the_epochs_once_they_are_known() -> None:
    config = load_config(["train.epochs=2", "optim.warmup_steps=500"])
    assert replace(config, train=replace(config.train, steps=500, epochs=None)).optim.warmup_steps == 500
    with pytest.raises(UserError, match=r"must be ≤ train\.steps=499"):
        replace(config, train=replace(config.train, steps=499, epochs=None))


@pytest.mark.parametrize("model", choices("model"))
def test_every_preset_composes_and_survives_its_own_yaml(model: str, tmp_path: Path) -> None:
    config = load_config([f"model={model}"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert read_config(path) == config


@pytest.mark.parametrize(
    ("verb", "schema"), [("plan", PlanConfig), ("prepare", PrepareConfig), ("validate", ValidateConfig)]
)
def test_a_preset_of_the_optimizer_is_taken_by_every_verb_that_has_the_keys_of_train(
    verb: str, schema: type[Config]
) -> None:
    config = load_config(["optim=muon", "data.path=rows.jsonl"], verb, schema, count_pieces=count_pieces)
    assert config.optim.kind is OptimizerKind.muon


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {hidden_size: 12, heads: 3}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        read_config(path)


def test_defaults_are_the_quickstarts_parts() -> None:
    config = load_config([])
    assert isinstance(config, Config)
    assert config.run_dir == "runs/tiny-stdlib"
    assert (config.router.num_experts, config.router.top_k) == (8, 2)
    assert config.router.aux_loss_coef > 0
    assert config.parallel.zero_stage == 1
    assert config.tokenizer.vocab_size == config.model.vocab_size


@pytest.mark.parametrize(
    ("path", "run_dir"),
    [
        ("books.txt", "runs/tiny-books"),
        ("books/*.txt", "runs/tiny-books"),
        ("corpus/", "runs/tiny-corpus"),
        ("../corpus/**/*.md", "runs/tiny-corpus"),
        ("shakespeare/input.txt", "runs/tiny-shakespeare-input"),
        ("other/input.txt", "runs/tiny-other-input"),
        ("/home/me/my books.txt", "runs/tiny-me-my-books"),
        ("owner/name", "runs/tiny-owner-name"),
        ("*.txt", "runs/tiny-files"),
    ],
)
def test_the_default_run_dir_differs_by_model_and_data(path: str, run_dir: str) -> None:
    assert load_config(["data=files", f"data.path='{path}'"]).run_dir == run_dir
    small = load_config(["model=small", "data=files", f"data.path='{path}'"])
    assert small.run_dir == run_dir.replace("tiny", "small")


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        ([], 2048),
        (["tokenizer=mistral"], 32000),
        (["tokenizer.vocab_size=512"], 512),
        (["tokenizer.vocab_size=3000"], 3000),
        (["tokenizer=mistral", "model.vocab_size=40000"], 40000),
        (["tokenizer.vocab_size=512", "model.vocab_size=600"], 600),
        (["tokenizer=mistral", "model=mixtral_8x22b"], 32768),
        (["model=small"], 4096),
    ],
)
def test_the_model_has_the_tokenizers_vocabulary_unless_stated(overrides: list[str], rows: int, tmp_path: Path) -> None:
    config = load_config(overrides, count_pieces=count_pieces)
    assert config.model.vocab_size == rows
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path / "config.yaml") == config


def test_the_built_in_corpus_has_a_prompt_of_its_own() -> None:
    assert load_config([]).train.sample_prompt == "def "
    assert load_config(["data=files", "data.path=books.txt"]).train.sample_prompt is None
    assert load_config(["train.sample_prompt=Once"]).train.sample_prompt == "Once"


@pytest.mark.parametrize(
    ("overrides", "world", "expected"),
    [
        (
            ["train.global_batch_size=12"],
            2,
            "train.global_batch_size=12 must be divisible by train.micro_batch_size=8 × 2 ranks = 16, as 16 is",
        ),
        (["parallel.expert_parallel_size=2"], 1, "parallel.expert_parallel_size=2 must divide the number of ranks, 1"),
        (["parallel.expert_parallel_size=2"], 3, "must be divisible"),
        (
            ["parallel.expert_parallel_size=2", "router.num_experts=3"],
            2,
            "parallel.expert_parallel_size=2 must divide router.num_experts=3",
        ),
        (
            ["parallel.expert_parallel_size=2", "model.mlp=dense"],
            2,
            "parallel.expert_parallel_size=2 must be 1 with model.mlp=dense",
        ),
    ],
)
def test_rules_that_need_the_number_of_ranks(overrides: list[str], world: int, expected: str) -> None:
    with pytest.raises(ValueError, match=expected.replace(".", r"\.")):
        load_config(overrides).check_world(world)


def test_accumulation_counts_micro_batches_per_rank() -> None:
    config = load_config(["train.micro_batch_size=2", "train.global_batch_size=16"])
    assert [config.accumulation(world) for world in (1, 2, 4)] == [8, 4, 2]


def test_a_source_added_on_the_command_line_is_typed() -> None:
    config = load_config(["data=files", "data.path=null", "+data.sources.code.path=src", "+data.sources.code.weight=2"])
    assert config.data.all_sources()["code"].weight == 2.0


@pytest.mark.parametrize("more", [[], ["model=small"], ["data=files"], ["++data.path=other.txt"]])
def test_data_path_alone_replaces_the_built_in_text(more: list[str]) -> None:
    config = load_config(["data.path=my.txt", *more])
    assert list(config.data.all_sources()) == ["text"]
    assert config.run_dir.endswith(("-my", "-other"))
    assert load_config(["data.path=null"]).data.all_sources().keys() == {"python", "prose", "arithmetic"}


def test_data_path_keeps_the_preset_that_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`data.path` replaces the built-in text, but not the other keys of a chosen `data` preset or experiment."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("path: rows.jsonl\ntext_field: body\n")
    (tmp_path / "experiment").mkdir()
    experiment = "# @package _global_\ndefaults:\n  - override /data: mine\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(experiment)
    monkeypatch.setattr("moe.config.presets._added_dirs", [tmp_path])
    for preset in ("data=mine", "experiment=mine"):
        data = load_config([preset, "data.path=other.jsonl"]).data
        assert (data.path, data.text_field) == ("other.jsonl", "body")


def test_a_source_can_be_removed() -> None:
    assert load_config(["~data.sources.prose"]).data.all_sources().keys() == {"python", "arithmetic"}


def test_experts_stay_inside_a_node_unless_asked() -> None:
    overrides = ["train.micro_batch_size=1", "parallel.expert_parallel_size=4"]
    load_config(overrides).check_world(8, 4)
    with pytest.raises(
        ValueError, match=r"parallel\.expert_parallel_size=4 must divide the 2 ranks of a node.*across_nodes=true"
    ):
        load_config(overrides).check_world(8, 2)
    load_config([*overrides, "parallel.expert_across_nodes=true"]).check_world(8, 2)


def test_a_tilde_in_run_dir_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load_config(["run_dir='~/runs/a'"]).run_dir == "/home/somebody/runs/a"
