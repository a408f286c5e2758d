"""A dense GPT-2 of transformers, trained by plain PyTorch: the outside reference of `moe bench time_to_loss`.

    torchrun --nproc-per-node 2 -m moe.bench.gpt run_dir=DIR key=value …

It takes `moe train`'s keys and reads the same token shards in the same order; of the model's keys it takes the
vocabulary, the hidden size, the heads and, as its own number of layers, `layers_of`. Gradients are averaged by torch's
DistributedDataParallel. The recipe is nanoGPT's for small models: learned positions, LayerNorm, GELU, tied embeddings,
AdamW with betas (0.9, 0.99) and weight decay 0.1, clipping at 1, warm-up, cosine to a tenth; `LEARNING_RATE` is the
best of 1e-3, 2e-3 and 4e-3 on the quickstart's data. DIR/metrics.jsonl gets each step's step, lm_loss and
step_seconds, and val_loss every `train.eval_every` steps.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe.bench.peer import adamw
from moe.config import Config
from moe.config.compose import load_config
from moe.data.loader import Batch
from moe.data.packing import NO_TARGET
from moe.distributed import rendezvous
from moe.distributed.mesh import Mesh
from moe.durable import append_line
from moe.plan.counts import parameter_parts
from moe.train.build import open_data
from moe.train.optim import learning_rate
from moe.train.progress import Display

LEARNING_RATE = 2e-3


def layers_of(config: Config) -> int:
    """The number of layers, of 12 H² weights each, whose weights come nearest to those that a token uses in the blocks
    of `config`'s model."""
    parts, model = parameter_parts(config), config.model
    embeddings = (1 if model.tie_word_embeddings else 2) * parts.embedding
    return max(1, round((parts.shared - embeddings + parts.active_experts) / (12 * model.hidden_size**2)))


class Gpt(nn.Module):
    """Token ids [B, S] → logits [B, S, V]."""

    def __init__(self, config: Config) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        shape = GPT2Config(
            vocab_size=config.model.vocab_size,
            n_positions=config.train.sequence_length,
            n_embd=config.model.hidden_size,
            n_layer=layers_of(config),
            n_head=config.model.num_attention_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        torch.manual_seed(config.train.seed)
        self.model: Any = GPT2LMHeadModel._from_config(shape, attn_implementation="sdpa", dtype=torch.float32)

    def forward(self, ids_BS: Tensor) -> Tensor:
        return self.model(input_ids=ids_BS).logits


def nats(model: nn.Module, batch: Batch) -> Tensor:
    """Summed over the batch's targets."""
    logits_BSV = model(batch.input_ids_BS)
    return F.cross_entropy(logits_BSV.flatten(0, 1), batch.labels_BS.flatten(), reduction="sum")


def targets(batches: list[Batch]) -> Tensor:
    return torch.tensor(sum(int((batch.labels_BS != NO_TARGET).sum()) for batch in batches), dtype=torch.float64)


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Batch], mesh: Mesh) -> float:
    """Nats per target of all ranks' batches."""
    loss = torch.stack([nats(model, batch).double() for batch in batches]).sum()
    summed, count = mesh.sum_(torch.stack((loss, targets(batches)))).tolist()
    return summed / count


def train(config: Config) -> None:
    """Every rank's part. A collective."""
    mesh = rendezvous.start(1)
    try:
        _train(config, mesh)
    finally:
        rendezvous.stop()


def _train(config: Config, mesh: Mesh) -> None:
    data = open_data(config, mesh, Display(is_main=False, steps=config.train.steps, log_every=1))
    bare = Gpt(config)
    model = DistributedDataParallel(bare) if mesh.world_size > 1 else bare
    config = replace(config, optim=replace(config.optim, lr=LEARNING_RATE, base_hidden_size=None, betas=[0.9, 0.99]))
    optimizer = adamw(bare.parameters(), config)
    file = Path(config.run_dir) / "metrics.jsonl"
    if mesh.is_main:
        file.parent.mkdir(parents=True, exist_ok=True)
    for step in range(config.train.steps):
        began = time.perf_counter()
        batches = data.loader.next_step()
        summed = _step(model, batches, mesh)
        nn.utils.clip_grad_norm_(bare.parameters(), config.optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad()
        metrics = {"step": step + 1, "lm_loss": summed, "step_seconds": time.perf_counter() - began}
        metrics["tokens"] = (step + 1) * config.train.global_batch_size * config.train.sequence_length
        if not math.isfinite(summed):
            raise RuntimeError(f"step {step + 1}: the loss is {summed}")
        if (step + 1) % config.train.eval_every == 0 or step + 1 == config.train.steps:
            metrics["val_loss"] = evaluate(bare, data.held_out, mesh)
        if mesh.is_main:
            append_line(file, json.dumps(metrics) + "\n")


def _step(model: nn.Module, batches: list[Batch], mesh: Mesh) -> float:
    """Gradients of the mean over the global batch's targets; returns that mean."""
    count = mesh.sum_(targets(batches)).item()
    total = torch.zeros((), dtype=torch.float64)
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = last  # gradients of the earlier micro-batches stay on this rank
        loss = nats(model, batch)
        (loss * (mesh.world_size / count)).backward()  # DistributedDataParallel averages over ranks
        total += loss.detach()
    return mesh.sum_(total).item() / count


if __name__ == "__main__":
    train(load_config(sys.argv[1:]))
