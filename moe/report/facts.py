"""Parameter counts and a one-line summary of a run, from its config.yaml alone."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf.errors import OmegaConfBaseException

from moe.config.router import RouterConfig, saved_router
from moe.errors import UserError
from moe.report.reader import RunHistory
from moe.report.scales import count


@dataclass(slots=True)
class Parameters:
    total: int
    active: int  # per token


def parameters(run: RunHistory) -> Parameters | None:
    """Exact counts, embeddings included. None if config.yaml lacks the shapes (an older run, or not one of moe's)."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = [run.setting(f"model.{name}") for name in (*names, "num_key_value_heads")]
    if not all(type(value) is int for value in values):
        return None
    vocab, hidden, ffn, layers, heads, kv_heads = values
    head_dim = run.setting("model.head_dim") or hidden // heads
    model = run.model
    if model is None:
        return None
    sparse = len(model.sparse_layer_numbers)
    dense, expert = 3 * hidden * ffn, 3 * hidden * model.expert_size
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    embeddings = vocab * hidden * (1 if run.setting("model.tie_word_embeddings") else 2)
    rest = embeddings + hidden + layers * (attention + 2 * hidden)
    rest += (layers - sparse) * dense
    if not sparse:
        return Parameters(rest, rest)
    router = _router(run)
    if router is None:
        return None
    rest += sparse * (router.num_parameters(hidden) + 3 * hidden * model.shared_size)
    chosen = router.choices_in(model.sparse_layer_numbers)
    return Parameters(rest + sparse * router.num_experts * expert, rest + chosen * expert)


def _router(run: RunHistory) -> RouterConfig | None:
    """The run's router; None if config.yaml has none, or a kind that this code doesn't know."""
    try:
        values = run.setting("router")
        return saved_router(values) if isinstance(values, dict) else None
    except (UserError, OmegaConfBaseException):
        return None


def brief(run: RunHistory) -> list[str]:
    """Short phrases for the page's head, the most informative first."""
    found = parameters(run)
    phrases = []
    if found is not None and found.active < found.total:
        phrases.append(f"{count(found.total)} parameters, {count(found.active)} active per token")
    elif found is not None:
        phrases.append(f"{count(found.total)} parameters")
    if run.sparse:
        router = _router(run)
        phrases.append(
            f"{router.num_experts} experts, {router.experts_per_token} a token ({router.kind})" if router else "sparse"
        )
    else:
        phrases.append("dense")
    for key, form in (
        ("model.num_hidden_layers", "{} layers"),
        ("model.hidden_size", "hidden size {}"),
        ("model.sliding_window", "window {}"),
        ("model.vocab_size", "vocabulary {:,}"),
    ):
        value = run.setting(key)
        if type(value) is int:
            phrases.append(form.format(value))
    batch, length = run.setting("train.global_batch_size"), run.setting("train.sequence_length")
    if type(batch) is int and type(length) is int:
        phrases.append(f"batch {batch:,} × {length:,} tokens")
    return phrases
