"""Keys with another value than their default that nothing reads, because another key switches off what would."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

from moe.config.adapter import WITH_DROPOUT
from moe.config.choices import BiasUpdate, Schedule, TrackingBackend
from moe.config.router_kinds import TokenChoiceConfig
from moe.config.rules import default_of
from moe.config.run import Config

MOST_LAYERS = 1000  # that are looked at: a configuration may state a billion


def idle_keys(config: Config) -> list[str]:
    """A line for each: the key, why nothing reads it, and what would. Warnings rather than errors: a grid over a switch
    and what it switches has such combinations. Keys of the routers and experts of `model.mlp=dense` are left out: a
    dense model to compare with states them as the sparse one does."""
    return [f"{_stated(key, value)} has no effect with {why}" for key, value, why in _idle(config)]


def _idle(config: Config) -> Iterator[tuple[str, Any, str]]:
    """(key, value, what switches it off; a way to switch it on)"""
    for key, why in _switched_off(config):
        section, _, name = key.partition(".")
        owner = getattr(config, section)
        value, schedules = getattr(owner, name), getattr(owner, "schedules", {})
        if name in schedules:
            yield f"{section}.schedules.{name}", schedules[name], why
        elif value != default_of(owner, name):
            yield key, value, why


def _switched_off(config: Config) -> Iterator[tuple[str, str]]:
    adapter, routed = config.adapter, config.model.sparse_layer_numbers
    routers = [config.router, *map(config.router.for_layer, config.router.layers)]
    if routed and all(isinstance(router, TokenChoiceConfig) for router in routers):
        if all(router.bias_update is BiasUpdate.none for router in routers):
            yield "router.bias_update_rate", "router.bias_update=none: set router.bias_update=sign"
        if all(router.capacity_factor is None for router in routers):
            yield "router.drop_policy", "router.capacity_factor=null, which drops nothing: set a capacity"
    if config.optim.schedule is Schedule.constant:
        yield "optim.min_lr_ratio", "optim.schedule=constant: set another schedule"
    if config.guard.spike_sigmas is None:
        yield "guard.spike_window", "guard.spike_sigmas=null: set it, as in guard.spike_sigmas=6"
    if not config.train.answer_metrics:
        for name in ("answer_rows", "answer_tokens"):
            yield f"train.{name}", "train.answer_metrics=[]: name a metric, as in train.answer_metrics=[exact_match]"
    if config.tracking.backend is TrackingBackend.none:
        yield "tracking.report", "tracking=none: set tracking=wandb"
    if routed and config.parallel.expert_parallel_size == 1:
        yield "parallel.expert_across_nodes", "parallel.expert_parallel_size=1: set the ranks that share experts"
    if adapter.trains_adapter and not _adapts_attention(config):
        attention = ", ".join(WITH_DROPOUT)
        yield "adapter.lora_dropout", f"adapters on none of {attention}: name one in adapter.target_modules"


def _adapts_attention(config: Config) -> bool:
    layers = range(min(config.model.num_hidden_layers, MOST_LAYERS))
    names = (f"model.layers.{layer}.self_attn.{name}" for layer in layers for name in WITH_DROPOUT)
    return any(config.adapter.adapts(name) for name in names)


def _stated(key: str, value: Any) -> str:
    text = value.name if isinstance(value, Enum) else str(value)
    return f"{key}={text.lower() if isinstance(value, bool) else text}"
