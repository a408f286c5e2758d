"""The overrides of `moe bench peers` and of the benchmarks that share its shape: those of a Mixtral."""

from __future__ import annotations

from dataclasses import fields

from moe.bench.peer import NOT_MIXTRAL
from moe.bench.settings import Rounds, split
from moe.config import Config, Mlp, ModelConfig, OptimizerKind, TopKRouterConfig
from moe.config.compose import load_config
from moe.config.flat import typed
from moe.distributed import rendezvous
from moe.errors import UserError

DEFAULTS = ["model=small", "train.sequence_length=512", "train.micro_batch_size=4", "train.global_batch_size=4"]


def parse(
    overrides: list[str], default: Rounds | None = None, names: tuple[str, ...] = ("rounds", "steps")
) -> tuple[Rounds, Config]:
    """`rounds=`, `steps=` (those in `names`), `precision=` (train.precision) and the overrides of `moe train`. Raises
    UserError."""
    keys, rest = split(overrides, default, names)
    rest = [f"train.{one}" if one.startswith("precision=") else one for one in rest]
    config = load_config([*DEFAULTS, *rest])
    train = config.train
    if config.model.mlp is not Mlp.sparse:
        raise UserError(f"model.mlp={config.model.mlp.value} must be sparse: the peer is a Mixtral")
    if not isinstance(config.router, TopKRouterConfig):
        raise UserError(f"router.kind={config.router.kind} must be topk: the peer is a Mixtral")
    if config.optim.kind is not OptimizerKind.adamw:
        raise UserError(f"optim={config.optim.kind.value} must be adamw: the peer trains with it")
    free = ("num_experts", "top_k", "aux_loss_coef", "z_loss_coef")
    fixed = [f"router.{one.name}" for one in fields(TopKRouterConfig) if one.name not in free]
    defaults = {"router": TopKRouterConfig(), "model": ModelConfig()}
    for key in (*fixed, *(f"model.{name}" for name in NOT_MIXTRAL)):
        section, _, name = key.partition(".")
        value, needed = getattr(getattr(config, section), name), getattr(defaults[section], name)
        if value != needed:
            raise UserError(f"{key}={typed(value)} must be {typed(needed)}: the peer is a Mixtral")
    if train.micro_batch_size != train.global_batch_size:
        raise UserError(
            f"train.micro_batch_size={train.micro_batch_size} must equal "
            f"train.global_batch_size={train.global_batch_size}: one micro-batch a step"
        )
    config.check_world(rendezvous.world_from_environment()[1])
    return keys, config
