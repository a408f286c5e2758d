"""Puts adapters into a model and freezes what they leave as it is.

An adapter's initial values are a function of (seed, name, global expert) alone, as a model's are.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from moe.adapters.low_rank import LoRAExperts, LoRALinear, LowRank
from moe.adapters.merge import adapted, is_part
from moe.config import AdapterConfig
from moe.config.adapter import WITH_DROPOUT
from moe.model.initialize import expert_seed
from moe.model.transformer import Transformer
from moe.sparse import Experts, Router


def attach(model: Transformer, config: AdapterConfig, seed: int) -> None:
    """Adds the adapters of `config`, with which the model computes as before, and freezes all other parameters but
    those of `adapter.modules_to_save`. Raises UserError for a name or pattern that fits nothing, and for a parameter
    that has an adapter and would train in full too.

    The model may have weights on any device but "meta"; they may be filled later: call `reset_magnitudes` then.
    """
    targets = dict(_targets(model, config))
    model.requires_grad_(False)
    for name, module in targets.items():
        _adapt(model, name, module, config, seed)
    _train_in_full(model, config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.base_names = frozenset(name for name, _ in model.named_parameters()) - trained


def reset_magnitudes(model: nn.Module) -> None:
    """Sets DoRA's lengths from the weights that the model has now."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.reset_magnitude()


def _targets(model: nn.Module, config: AdapterConfig) -> Iterator[tuple[str, nn.Module]]:
    can = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Experts, Router)) and name != "lm_head"
    }
    config.require_targets(can)
    for name, module in can.items():
        if config.adapts(name):
            yield name, module


def _adapt(model: nn.Module, name: str, module: nn.Module, config: AdapterConfig, seed: int) -> None:
    rank = config.rank_of(name)
    scale = config.scale(rank)
    if isinstance(module, Experts):
        pairs = [_low_rank(f"{name}.{weight}", getattr(module, weight), rank, scale, seed, module.first_expert)
                 for weight in ("gate_up_proj", "down_proj")]  # fmt: skip
        _replace(model, name, LoRAExperts(module, *pairs))
        return
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    low_rank = _low_rank(name, weight, rank, scale, seed)
    if isinstance(module, Router):
        module.lora = low_rank
        return
    assert isinstance(module, nn.Linear)
    attention = name.rpartition(".")[2] in WITH_DROPOUT
    dropout = config.lora_dropout if attention else 0.0
    _replace(model, name, LoRALinear(module, low_rank, dropout=dropout, dora=config.use_dora and attention))


def _low_rank(name: str, weight: nn.Parameter, rank: int, scale: float, seed: int, first_expert: int = 0) -> LowRank:
    low_rank = LowRank(weight.shape, rank, scale, weight.device).to(weight.dtype)
    experts = weight.shape[0] if weight.ndim == 3 else 1
    low_rank.draw([expert_seed(seed, name, "lora", first_expert + local) for local in range(experts)])
    return low_rank


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _train_in_full(model: nn.Module, config: AdapterConfig) -> None:
    names = dict(model.named_parameters())
    own = [name for name in names if not is_part(name)]
    for name in config.saved_in_full(own, {adapted(name) for name in names if is_part(name)}):
        names[name].requires_grad_()
