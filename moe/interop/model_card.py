"""The README.md of an exported model: what it is, what it was trained on and how far, in the Hub's format."""

from __future__ import annotations

from pathlib import Path

from moe.checkpoint.layout import CHECKPOINTS
from moe.checkpoint.state import TrainState
from moe.config import Config, Mlp
from moe.config.compose import to_yaml
from moe.plan.counts import count_parameters
from moe.untrusted import is_real, json_lines

METRICS = "metrics.jsonl"
SHOWN = ("val_loss", "val_perplexity", "lm_loss", "load_balancing_loss", "max_violation", "dropped_fraction")


def run_metrics(checkpoint: Path, step: int) -> dict[str, float]:
    """The last values, up to `step`, of a run's metrics that the card shows; {} for a folder that no run wrote. Raises
    UserError, OSError."""
    folder = checkpoint.resolve()
    path = folder.parent.parent / METRICS
    if folder.parent.name != CHECKPOINTS or not path.is_file():
        return {}
    found: dict[str, float] = {}
    for line in json_lines(path):
        row = line.value or {}
        at = row.get("step")
        if type(at) is int and at <= step:
            found |= {name: float(row[name]) for name in SHOWN if is_real(row.get(name))}
    return {name: found[name] for name in SHOWN if name in found}


def model_card(config: Config, state: TrainState, architecture: str, metrics: dict[str, float]) -> str:
    """Markdown with the Hub's YAML header."""
    total, active = count_parameters(config)
    model, router = config.model, config.router
    shape = f"{model.num_hidden_layers} layers, hidden size {model.hidden_size}, vocabulary {model.vocab_size:,}"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *(["tags:", "- mixture-of-experts"] if model.mlp is Mlp.sparse else []),
        "---",
        "# Model card",
        "",
        f"A `{architecture}` with {total:,} parameters: {shape}.",
    ]
    if model.mlp is Mlp.sparse:
        lines += [
            "",
            f"Each sparse layer has {router.num_experts} experts of width {model.expert_size:,}; a token uses "
            f"{router.experts_per_token} of them, {active:,} parameters in all.",
        ]
    lines += ["", "## Training", ""]
    if state.step:
        sources = ", ".join(
            f"{name} (`{one.path or one.format.name}`)" for name, one in config.data.all_sources().items()
        )
        lines += [
            f"- {state.step:,} steps, {state.tokens:,} tokens of {config.train.sequence_length} per sequence",
            f"- Data: {sources}; fingerprint of the token shards `{state.data}`",
        ]
        if config.init_from:
            lines.append(f"- Started from the weights of `{config.init_from}`")
    else:
        lines.append("- Not trained here: the weights are those of another model.")
    lines.append(f"- Fingerprint of the tokenizer `{state.tokenizer}`")
    if metrics:
        lines += ["", "## Metrics", "", "| metric | last value |", "| --- | --- |"]
        lines += [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
    lines += ["", "## Configuration", "", "```yaml", to_yaml(config).rstrip(), "```", ""]
    return "\n".join(lines)
