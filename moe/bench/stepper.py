"""Optimizer steps of `moe train` on random tokens, for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe.config import Config
from moe.data.loader import Batch
from moe.distributed.mesh import Mesh
from moe.engine import build_engine, prepare
from moe.engine.base import Engine
from moe.model.build import build_model
from moe.model.transformer import Transformer
from moe.train.objective import TrainedStep, training_step
from moe.train.startup import time_experts


def random_batch(config: Config, generator: torch.Generator, first_sample: int = 0) -> Batch:
    """One micro-batch of random token ids, one document per sequence; each token's target is the next one."""
    train = config.train
    shape = (train.micro_batch_size, train.sequence_length)
    ids_BS = torch.randint(config.model.vocab_size, shape, generator=generator)
    return batch_of(ids_BS, first_sample)


def batch_of(ids_BS: torch.Tensor, first_sample: int = 0) -> Batch:
    """A batch of token ids, one document per sequence; the last position has no target."""
    labels_BS = torch.full_like(ids_BS, -100)
    labels_BS[:, :-1] = ids_BS[:, 1:]
    samples_B = torch.arange(first_sample, first_sample + ids_BS.shape[0])
    return Batch(
        input_ids_BS=ids_BS,
        labels_BS=labels_BS,
        document_ids_BS=torch.zeros_like(ids_BS, dtype=torch.int32),
        sample_ids_B=samples_B,
        source_ids_B=torch.zeros_like(samples_B),
        document_lengths=[ids_BS.shape[1]] * ids_BS.shape[0],
    )


def timed_step(
    config: Config, engine: Engine, batches: Sequence[Batch], step: int, *, diagnose: bool = True
) -> TrainedStep:
    """`training_step` at the peak rate; `diagnose` is its. A collective. Raises RuntimeError for a skipped step, whose
    time would say nothing."""
    done = training_step(config, engine.mesh, engine, batches, step=step, lr=config.peak_rate, diagnose=diagnose)
    if done.result.skipped:
        raise RuntimeError(f"step {step} was skipped ({done.result.skipped.value}): its time would say nothing")
    return done


class Stepper:
    """Each call is one optimizer step of `config`'s model on random tokens. A collective. Raises RuntimeError for a
    skipped step.

    `model` is a model of `config`; None builds one with the initial weights of `moe train`.
    """

    def __init__(self, config: Config, mesh: Mesh, model: Transformer | None = None) -> None:
        self.config, self.mesh = config, prepare(config, mesh)
        time_experts(config, self.mesh)
        if model is None:
            model = build_model(config, mesh.device, self.mesh.expert_group)
        self.engine = build_engine(model, config, self.mesh)
        self._generator = torch.Generator().manual_seed(mesh.data_parallel_rank)
        self._step = 0

    def __call__(self, *, diagnose: bool = True) -> TrainedStep:
        """`diagnose` is `timed_step`'s."""
        batches = [random_batch(self.config, self._generator) for _ in range(self.engine.accumulation)]
        self._step += 1
        return timed_step(self.config, self.engine, batches, self._step - 1, diagnose=diagnose)
