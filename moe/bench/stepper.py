"""Optimizer steps on random tokens, as in `moe.train.loop` but without data and the figures that it logs."""

from __future__ import annotations

import torch

from moe.config import Config, Mlp
from moe.dist.engine import Engine, expert_groups
from moe.dist.topology import Topology
from moe.model.transformer import Transformer
from moe.sparse.balance import balance_loss


class Stepper:
    """Each call is one optimizer step of `config`'s model and batch. A collective."""

    def __init__(self, config: Config, topology: Topology) -> None:
        self.config, self.topology = config, topology
        model = Transformer(config.model, config.router, config.experts, expert_group=expert_groups(topology)[0])
        model.init_weights(config.train.seed)
        self.engine = Engine(model.to(topology.device), config, topology)
        self._generator = torch.Generator().manual_seed(topology.rank)

    def __call__(self) -> None:
        config, engine = self.config, self.engine
        shape = (config.train.micro_batch_size, config.train.sequence_length)
        for _ in range(engine.accumulation):
            ids_BS = torch.randint(config.model.vocab_size, shape, generator=self._generator).to(self.topology.device)
            output = engine(ids_BS, labels_BS=ids_BS.roll(-1, 1))
            loss = output.lm_loss_sum / ids_BS.numel()
            if config.model.mlp is Mlp.sparse:
                loss = (
                    loss + balance_loss(output.routers, config.router, num_layers=config.model.num_hidden_layers).total
                )
            engine.backward(loss)
            engine.step(config.optim.lr)
