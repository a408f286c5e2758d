"""Optimizer steps through an engine on this rank, for tests that compare them."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.adapters.attach import attach, reset_magnitudes
from moe.config import Config
from moe.config.compose import load_config
from moe.data.loader import Batch
from moe.distributed import rendezvous
from moe.distributed.mesh import Mesh
from moe.engine import build_engine, prepare
from moe.engine.base import Engine, States
from moe.engine.parameters import freeze
from moe.model.build import build_model
from moe.model.transformer import Transformer
from moe.sparse.balance import balance_loss
from moe.train.objective import training_step
from tests.bias_router.router import install

install()  # router=bias

COMPOSED = Path(tempfile.mkdtemp(prefix="configs-"))  # of this process of tests and the ranks that it forks
OWNER = os.getpid()
atexit.register(lambda: os.getpid() == OWNER and shutil.rmtree(COMPOSED, ignore_errors=True))

# The rate is low because Adam amplifies rounding errors: at 3e-3 those of 1e-7 in a loss became up to 1e-5 in 20 steps.
SMALL = [
    "model.vocab_size=320", "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=2",
    "train.sequence_length=16", "train.micro_batch_size=2", "train.global_batch_size=8", "optim.lr=1e-3",
    "optim.max_grad_norm=0.5", "router.num_experts=4", "model.initializer=normal", "model.initializer_range=0.2",
]  # fmt: skip


@dataclass
class Training:
    """What a run is judged by. `counts` is [step, layer, expert] over the global batch."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    counts: list[list[list[int]]] = field(default_factory=list)
    idle_here: bool = False  # some expert had no token from this rank in some micro-batch
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    experts: set[str] = field(default_factory=set)
    buffers: dict[str, Tensor] = field(default_factory=dict)  # of the routers
    # The least difference of a token's last chosen score from the next one, relative, where a test measures it.
    closest_choice: float = float("inf")


def config_of(overrides: list[str]) -> Config:
    """Composed once for all ranks and tests, since that takes as long as the steps of most tests."""
    name = hashlib.sha256(json.dumps(overrides).encode()).hexdigest()
    with (COMPOSED / name).open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if content := file.read():
            return pickle.loads(content)
        config = load_config([*SMALL, *overrides])
        file.write(pickle.dumps(config))
    return config


def micro_batches(config: Config, step: int) -> list[Batch]:
    """All of a step's micro-batches in global order; a fifth of the targets is masked, and the whole last micro-batch:
    on four ranks one rank has no target at all. With rows for fine-tuning sequences are packed: a question without
    targets and its answer, again, and padding, of which the last micro-batch consists."""
    generator = torch.Generator().manual_seed(step)
    train = config.train
    count, batches = train.global_batch_size // train.micro_batch_size, []
    for index in range(count):
        shape = (train.micro_batch_size, train.sequence_length)
        ids = torch.randint(0, config.model.vocab_size, shape, generator=generator)
        labels = torch.where(torch.rand(shape, generator=generator) < 0.2, -100, ids.roll(-1, 1))
        documents, real_T = torch.zeros_like(ids, dtype=torch.int32), None
        if config.data.has_records:
            labels, documents, real_T = _packed(ids, generator)
            real_T = real_T[:0] if index == count - 1 else real_T
        labels = torch.full_like(labels, -100) if index == count - 1 else labels
        first = step * train.global_batch_size + index * train.micro_batch_size
        samples_B = torch.arange(first, first + train.micro_batch_size)
        lengths = [int(count) for row in documents for count in row.unique_consecutive(return_counts=True)[1]]
        batches.append(Batch(ids, labels, documents, samples_B, samples_B * 0, real_T, lengths))
    return batches


def joined(batches: list[Batch]) -> Batch:
    """One micro-batch of several."""
    names = [one.name for one in fields(Batch) if one.name not in ("real_T", "document_lengths")]
    tensors: dict[str, Any] = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    whole = Batch(**tensors)
    whole.document_lengths = [length for batch in batches for length in batch.document_lengths or []]
    if any(batch.real_T is not None for batch in batches):
        size = batches[0].input_ids_BS.numel()
        parts = [torch.arange(size) if batch.real_T is None else batch.real_T for batch in batches]
        whole.real_T = torch.cat([number * size + real_T for number, real_T in enumerate(parts)])
    return whole


def _packed(ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(labels, document ids, places of the rows' tokens) of rows of 3 to 6 tokens end to end, of which the first half
    is a question; padding fills the sequence."""
    labels, documents = torch.full_like(ids, -100), torch.zeros_like(ids, dtype=torch.int32)
    real = torch.zeros_like(ids, dtype=torch.bool)
    for sequence in range(len(ids)):
        start = row = 0
        while start + 6 <= ids.shape[1]:
            end = start + int(torch.randint(3, 7, (), generator=generator))
            documents[sequence, start:end] = row
            learnt = slice((start + end) // 2, end - 1)
            labels[sequence, learnt] = ids[sequence, 1:][learnt]
            start, row = end, row + 1
        documents[sequence, start:] = row
        real[sequence, :start] = True
    return labels, documents, real.flatten().nonzero().squeeze(1)


def backward_by_hand(model: Transformer, config: Config, step: int) -> None:
    """Gradients of a step's loss over all of its micro-batches, without any of the engines' code."""
    batches = micro_batches(config, step)
    targets = sum(int((batch.labels_BS != -100).sum()) for batch in batches)
    for batch in batches:
        output = model(batch.input_ids_BS, labels_BS=batch.labels_BS)
        balance = balance_loss(output.routers)
        ((output.lm_loss_sum * (len(batches) / targets) + balance) / len(batches)).backward()


def starve(model: Transformer, idle: list[int]) -> None:
    """Make every layer's router pass the experts `idle` over, by a hidden dimension that is large for all tokens."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3.0
        for name, weight in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                weight[:, 0] = 0.0
                weight[idle, 0] = -20.0


def build(
    config: Config, idle: list[int] | None = None, change: Callable[[Transformer], None] | None = None
) -> tuple[Mesh, Engine]:
    """`change` is made to the model before an engine takes it."""
    mesh = prepare(config, rendezvous.start(config.parallel.expert_parallel_size))
    torch.set_num_threads(1)
    model = build_model(config, mesh.device, mesh.expert_group)
    if config.adapter.trains_adapter:
        attach(model, config.adapter, config.train.seed)
        reset_magnitudes(model)
    freeze(model, config.optim)
    starve(model, idle or []) if idle else None
    change(model) if change else None
    return mesh, build_engine(model, config, mesh)


def router_buffers(engine: Engine) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in engine.model.named_buffers() if ".gate." in name}


def engine_steps(config: Config, mesh: Mesh, engine: Engine, first: int, count: int) -> Training:
    """Steps `first` … `first + count − 1` on this rank's micro-batches; losses, norms and counts are over all ranks."""
    done = Training(experts=engine.expert_names)
    layers = config.model.sparse_layer_numbers
    per_token_L1 = torch.tensor([[config.router.for_layer(layer).experts_per_token] for layer in layers])

    def record(module: Any, inputs: Any, output: Any) -> None:
        done.idle_here |= any(bool((router.counts_E == 0).any()) for router in output.routers)

    hook = engine.model.register_forward_hook(record)
    for step in range(first, first + count):
        whole = micro_batches(config, step)
        batches, choices_L1 = whole[mesh.rank :: mesh.world_size], per_token_L1 * sum(batch.tokens for batch in whole)
        result = training_step(config, mesh, engine, batches, step=step, lr=config.optim.lr)
        assert result.result.skipped is None
        done.losses.append(result.metrics["loss"])
        shares_LE = torch.tensor(result.metrics["expert_shares"], dtype=torch.float64)
        done.counts.append((shares_LE * choices_L1).round().long().tolist())
        done.norms.append(result.result.grad_norm)
    hook.remove()
    return done


def around_two_steps(overrides: list[str], idle: list[int]) -> tuple[States, States]:
    """The optimizer's state before and after two steps in which the router passes over the experts `idle`."""
    config = config_of(overrides)
    mesh, engine = build(config, idle)
    before = engine.optimizer_state.gather()
    engine_steps(config, mesh, engine, 0, 2)
    return before, engine.optimizer_state.gather()


def gathered(results: list[Training], expert: int) -> dict[str, dict[str, Tensor]]:
    """Whole tensors from the first `expert` ranks' slices."""
    return {
        kind: {
            name: torch.cat([result.state[kind][name] for result in results[:expert]])
            if name in results[0].experts and expert > 1
            else tensor
            for name, tensor in tensors.items()
        }
        for kind, tensors in results[0].state.items()
    }
