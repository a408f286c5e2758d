"""Configurations of earlier versions: migrated in run directories, rejected with the current name as overrides."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from moe.config import ModelConfig
from moe.config.compose import ConfigError, load_config, read_config, to_yaml
from moe.config.migrate import CONFIG_VERSION, RENAMED, migrate, renamed
from moe.errors import UserError
from moe.report.reader import read_run
from moe.train.run_directory import check_resumable

# config.yaml of `moe train parallel.expert=2 tracking=none run_dir=runs/before`, as version 0 wrote it.
VERSION_0 = """\
run_dir: runs/before
model:
  vocab_size: 2048
  hidden_size: 128
  intermediate_size: 256
  num_hidden_layers: 4
  num_attention_heads: 4
  num_key_value_heads: 2
  head_dim: null
  max_position_embeddings: 32768
  rope_theta: 10000.0
  rms_norm_eps: 1.0e-05
  sliding_window: 128
  tie_word_embeddings: false
  initializer_range: 0.02
  hidden_dropout: 0.0
  mlp: sparse
  attention: auto
  recompute: none
router:
  num_experts: 8
  top_k: 2
  aux_loss_coef: 0.02
  z_loss_coef: 0.001
  jitter_noise: 0.0
  capacity_factor: null
  drop_policy: position
experts:
  backend: auto
data:
  path: null
  format: auto
  text_field: text
  sources:
    python:
      path: python
      format: stdlib
      text_field: text
      weight: 0.5
      subset: null
      split: train
    prose:
      path: prose
      format: stdlib
      text_field: text
      weight: 0.35
      subset: null
      split: train
    arithmetic:
      path: arithmetic
      format: stdlib
      text_field: text
      weight: 0.15
      subset: null
      split: train
  held_out: 0.05
  cache_dir: ~/.cache/moe
tokenizer:
  kind: sentencepiece
  path: null
  vocab_size: 2048
  train_bytes: 2000000
optim:
  lr: 0.001
  betas:
  - 0.9
  - 0.95
  eps: 1.0e-08
  weight_decay: 0.1
  max_grad_norm: 1.0
  schedule: cosine
  warmup_steps: null
  decay_steps: null
  min_lr_ratio: 0.1
parallel:
  expert: 2
  expert_across_nodes: false
  zero_stage: 1
  offload_optimizer: false
tracking:
  backend: none
  project: moe
  name: null
checkpoint:
  every: 200
  keep: 2
  keep_every: null
  background: true
  max_failures: 3
  allow_changes: false
guard:
  max_skipped: 5
  spike_sigmas: null
  spike_window: 128
  hang_seconds: 600.0
train:
  steps: 300
  seed: 0
  sequence_length: 256
  micro_batch_size: 8
  global_batch_size: 16
  precision: float32
  eval_every: 50
  eval_sequences: 128
  sample_every: 100
  sample_prompt: 'def '
  sample_tokens: 64
  log_every: 10
  peak_tflops: null
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory of version 0, with the files that reading its configuration needs."""
    (tmp_path / "config.yaml").write_text(VERSION_0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lm_loss": 7.0, "tokens": 4096}\n')
    return tmp_path


def test_version_0_is_read_as_todays(run_dir: Path) -> None:
    today = load_config(
        ["parallel.expert_parallel_size=2", "tracking=none", "run_dir=runs/before", "model.initializer=normal"]
    )
    assert read_config(run_dir / "config.yaml") == today
    assert yaml.safe_load(to_yaml(today))["config_version"] == CONFIG_VERSION


def test_a_run_of_version_0_goes_on_with_nothing_changed(run_dir: Path) -> None:
    today = load_config(
        ["parallel.expert_parallel_size=2", "tracking=none", "run_dir=runs/before", "model.initializer=normal"]
    )
    assert check_resumable(run_dir, today, ("fingerprint", "fingerprint")) == []


def test_the_report_reads_version_0_under_todays_keys_and_shows_its_text(run_dir: Path) -> None:
    run = read_run(run_dir)
    assert run.setting("parallel.expert_parallel_size") == 2
    assert run.config_text == VERSION_0


def test_a_newer_version_is_one_line_for_training_and_report(run_dir: Path) -> None:
    newer = f"config_version: {CONFIG_VERSION + 1}\n{VERSION_0}engine_of_the_future: true\n"
    (run_dir / "config.yaml").write_text(newer)
    for read in (lambda: read_config(run_dir / "config.yaml"), lambda: read_run(run_dir)):
        with pytest.raises(
            ValueError, match=f"config_version={CONFIG_VERSION + 1} is newer than this code's"
        ) as caught:
            read()
        assert str(caught.value).startswith(str(run_dir / "config.yaml"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["one", -1, 1.5, True, None])
def test_a_version_is_a_whole_number(version: object) -> None:
    with pytest.raises(ValueError, match=f"config_version={version} must be a whole number"):
        migrate({"config_version": version})


def test_migration_keeps_its_argument_and_todays_keys() -> None:
    before = {"parallel": {"expert": 4, "zero_stage": 2}}
    assert migrate(before) == {
        "parallel": {"expert_parallel_size": 4, "zero_stage": 2}, "config_version": CONFIG_VERSION,
    }  # fmt: skip
    assert before == {"parallel": {"expert": 4, "zero_stage": 2}}
    # Runs between the renaming and version 1 have the current key but no version.
    between = {"parallel": {"expert_parallel_size": 4}}
    assert migrate(between) == between | {"config_version": CONFIG_VERSION}
    with pytest.raises(ValueError, match=r"parallel\.expert is now called expert_parallel_size, and both are set"):
        migrate({"parallel": {"expert": 4, "expert_parallel_size": 2}})


def test_an_old_key_in_todays_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"config_version: {CONFIG_VERSION}\n{VERSION_0}")
    with pytest.raises(ConfigError, match=r"config\.yaml: parallel\.expert is now parallel\.expert_parallel_size$"):
        read_config(path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("parallel.expert=2", "parallel.expert=2: parallel.expert is now parallel.expert_parallel_size"),
        ("+parallel.expert=2", "parallel.expert=2: parallel.expert is now parallel.expert_parallel_size"),
        ("parallel={expert:2}", "parallel.expert is now parallel.expert_parallel_size"),
        ("experts=loop", "experts=loop: write experts.backend=loop"),
        ("parallel=default", "parallel=default: leave it out, it is the default"),
        ("config_version=0", f"config_version=0 must be {CONFIG_VERSION}, this code's: leave it out"),
    ],
)
def test_an_old_override_is_one_line_with_todays(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([override])
    assert str(caught.value) == expected


def test_every_renaming_ends_at_a_key_of_today() -> None:
    today = yaml.safe_load(to_yaml(load_config([])))
    for version, keys in RENAMED.items():
        assert version <= CONFIG_VERSION
        for old in keys:
            node, now = today, renamed(old)
            assert now is not None
            for part in now.split("."):
                node = node[part]


def test_a_configuration_of_before_a_default_changed_keeps_what_it_meant() -> None:
    assert migrate({"config_version": 2, "model": {"hidden_size": 64}})["model"]["initializer"] == "normal"
    assert migrate({"config_version": 2, "model": {"initializer": "fan_in"}})["model"]["initializer"] == "fan_in"
    assert "model" not in migrate({"config_version": CONFIG_VERSION})


def test_values_of_another_type_are_left_to_their_rules() -> None:
    assert migrate({"model": 3})["model"] == 3
    with pytest.raises(UserError, match=r"rope_scaling\.rope_type=\[1\] must be one of llama3, yarn"):
        ModelConfig(rope_scaling={"rope_type": [1]})
