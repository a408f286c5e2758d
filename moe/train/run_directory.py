"""A run's directory holds one model for its whole life."""

from __future__ import annotations

from pathlib import Path

from moe.checkpoint.layout import CONFIG
from moe.config import BiasUpdate, Config, Schedule
from moe.config.compose import read_config
from moe.config.flat import flatten
from moe.errors import UserError

# What a checkpoint's tensors depend on: with another value the run can't continue.
FIXED = (
    "model", "router.kind", "router.num_experts", "optim.kind", "optim.freeze", "adapter.kind", "adapter.r",
    "adapter.target_modules", "adapter.rank_pattern", "adapter.modules_to_save", "adapter.use_dora",
)  # fmt: skip
BIAS = "bias_update"  # `none`: the router has no bias; any other value: it has one
# These change how the run is computed, split, watched or stored, not its mathematics. Data and tokenizer are compared
# by fingerprint.
NEUTRAL = (
    "run_dir", "init_from", "engine", "check_memory", "profile", "tracking", "checkpoint", "parallel", "tokenizer",
    "experts.backend", "experts.exchange_chunks", "experts.two_batch_overlap", "model.attention", "model.recompute",
    "model.initializer", "model.initializer_range",
    "data.cache_dir", "data.path", "data.format", "data.records", "data.text_field", "data.prompt_field",
    "data.completion_field", "data.messages_field", "data.template", "data.loss_on", "data.long_rows",
    "train.answer_metrics", "train.answer_rows", "train.answer_tokens",
    "train.eval_every", "train.eval_sequences", "train.sample_every", "train.sample_prompt", "train.sample_tokens",
    "train.log_every", "train.peak_tflops", "alarm", "guard.max_skipped", "guard.hang_seconds", "guard.name_stragglers",
)  # fmt: skip


def differences(old: Config, new: Config) -> dict[str, tuple[object, object]]:
    """{key: (old value, new value)} where they differ."""
    before, after = flatten(old), flatten(new)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def model_differences(old: Config, new: Config) -> dict[str, tuple[object, object]]:
    """{key: (old value, new value)} where the models differ in more than how they are computed."""
    changed = differences(old, new).items()
    return {key: values for key, values in changed if _under(key, ("model", "router")) and not _under(key, NEUTRAL)}


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def check_resumable(checkpoint: Path, config: Config, data: tuple[str, str]) -> list[str]:
    """Lines that tell what changed since `checkpoint`; `data` is the fingerprint of its data and of today's.

    Raises UserError for what can't change, and for what changes the mathematics unless `checkpoint.allow_changes`.
    """
    old_config = read_config(checkpoint / CONFIG)
    changed = differences(old_config, config)
    lines = [f"{key}: {old} → {new}" for key, (old, new) in changed.items()]
    # Another number of steps changes the learning rates, except where they depend on the step alone.
    flat = config.optim.schedule is Schedule.constant and config.optim.warmup_steps is not None
    harmless = (*NEUTRAL, "train.steps") if flat else NEUTRAL
    if old_config.peak_rate == config.peak_rate:
        harmless = (*harmless, "optim.lr", "optim.base_hidden_size")
    mathematics = []
    for (key, (old, new)), line in zip(changed.items(), lines, strict=True):
        if _under(key, NEUTRAL):
            continue
        if _under(key, FIXED) or (key.endswith(BIAS) and {old, new} & {BiasUpdate.none.name, None}):
            raise UserError(
                f"{key}={new}, but the checkpoint {checkpoint} was written with {key}={old}: "
                "set it back, or start another run with run_dir=…"
            )
        if not _under(key, harmless):
            mathematics.append(line)
    if data[0] != data[1]:
        lines.append(f"the data's fingerprint: {data[0][:12]} → {data[1][:12]}")
        mathematics.append(lines[-1])
    if mathematics and not config.checkpoint.allow_changes:
        raise UserError(
            f"since {checkpoint} this changed, and with it the mathematics of the run: {'; '.join(mathematics)}; "
            "checkpoint.allow_changes=true goes on with it, run_dir=… starts another run"
        )
    return lines
