"""Trained models in a notebook: load a run, look at logits and routing, generate, train by hand (docs/api.md).

    from moe import api

    run = api.load("runs/tiny-stdlib")
    print(run.generate("Once", max_new_tokens=40))
    logits_SV = run.logits("Once upon a time")

Legend: B sequences, S tokens of a text, V vocabulary, K choices per token, L sparse layers.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.checkpoint.layout import CONFIG
from moe.checkpoint.model_writer import write_model
from moe.checkpoint.reader import read_model, resolve, tokenizer_folder
from moe.checkpoint.state import TrainState, read_state
from moe.config import AdapterConfig, Config, Precision
from moe.config.compose import read_config
from moe.config.generate import Sampling
from moe.data.tokenizer import Tokenizer, load_saved
from moe.errors import UserError
from moe.inference.generate import generate
from moe.kernels.policy import choose_device, torch_dtype
from moe.model.transformer import Transformer
from moe.sparse import Randomness, balance_loss

__all__ = ["LayerRouting", "LoadedRun", "UserError", "load"]


def load(path: str | Path, *, device: str = "auto", dtype: str = "float32", check_memory: bool = True) -> LoadedRun:
    """The newest whole checkpoint of a run directory, or one checkpoint, verified by SHA-256.

    `device` is `auto`, `cpu`, `cuda` or `cuda:N`; `dtype` is `float32` or `bfloat16`. Damaged checkpoints that are
    passed over are warnings. Raises UserError, one line, where nothing can be loaded.
    """
    if dtype not in Precision.__members__:
        raise UserError(f"dtype={dtype} must be one of {', '.join(Precision.__members__)}")
    where, number = choose_device(device), torch_dtype(Precision[dtype])
    folder = resolve(Path(path).expanduser(), lambda line: warnings.warn(line, stacklevel=4))
    model = read_model(folder, device=where, dtype=number, check_memory=check_memory)
    return LoadedRun(
        folder=folder,
        config=read_config(folder / CONFIG),
        state=read_state(folder),
        tokenizer=load_saved(tokenizer_folder(folder)),
        model=model,
    )


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """One sparse layer's routing of one text, in token order: the experts of each token, the best first, with the
    weights that their outputs got; probabilities of all experts [S, E]."""

    experts: list[list[int]]
    weights: list[list[float]]
    probabilities_SE: Tensor


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A checkpoint's model with all that belongs to it. `model` is a plain `torch.nn.Module` in evaluation mode."""

    folder: Path
    config: Config
    state: TrainState
    tokenizer: Tokenizer
    model: Transformer

    def encode(self, text: str) -> Tensor:
        """[S] int64 on the model's device: the ids of a document that begins with `text`, its BOS included."""
        return torch.tensor([self.tokenizer.bos_id, *self.tokenizer.encode(text)], device=self.model.device)

    @torch.no_grad()
    def logits(self, text: str) -> Tensor:
        """[S, V]: row i predicts the token after token i of `encode(text)`; V are the tokenizer's ids."""
        logits_BSV = self.model(self.encode(text)[None]).logits_BSV
        assert logits_BSV is not None
        return logits_BSV[0, :, : self.tokenizer.vocab_size]

    @torch.no_grad()
    def routing(self, text: str) -> list[LayerRouting]:
        """[L]: which experts each token of `encode(text)` went to; [] for a dense model."""
        ids_BS = self.encode(text)[None]
        found = []
        for router in self.model(ids_BS).routers:
            experts: list[list[int]] = [[] for _ in range(ids_BS.shape[1])]
            weights: list[list[float]] = [[] for _ in range(ids_BS.shape[1])]
            chosen = router.choices
            rows = zip(chosen.tokens_N.tolist(), chosen.experts_N.tolist(), chosen.weights_N.tolist(), strict=True)
            for token, expert, weight in rows:
                experts[token].append(expert)
                weights[token].append(weight)
            found.append(LayerRouting(experts, weights, router.probs_TE))
        return found

    def generate(self, prompt: str, **sampling: Any) -> str:
        """The continuation of `prompt`; the keywords are the sampling keys of `moe generate` (`max_new_tokens`,
        `temperature`, `top_k`, `top_p`, `repetition_penalty`, `stop`, `seed`). Raises UserError."""
        return generate(self.model, self.tokenizer, [prompt], Sampling(**sampling))[0]

    def loss(self, ids_BS: Tensor, step: int = 0) -> Tensor:
        """The training loss of sequences [B, S]: mean cross-entropy of each next token in nats, plus the routers'
        losses with their coefficients. A scalar to call `backward()` on. After `model.train()`, dropout and jitter,
        where configured, take their numbers from (train.seed, `step`, row)."""
        rows_B = torch.arange(len(ids_BS), device=ids_BS.device)
        randomness = Randomness.of(self.config.train.seed, step, rows_B) if self.model.training else None
        noise = self.config.train.neftune_noise_alpha
        output = self.model(ids_BS[:, :-1], labels_BS=ids_BS[:, 1:], randomness=randomness, neftune_noise_alpha=noise)
        assert output.lm_loss_sum is not None
        loss = output.lm_loss_sum / ids_BS[:, 1:].numel()
        return loss + balance_loss(output.routers) if output.routers else loss

    def save(self, folder: str | Path) -> None:
        """Writes the model as it is now into a new folder, which `load`, `moe generate` and `init_from`
        read; an adapter is merged into it. Raises UserError where the folder exists, OSError."""
        config = replace(self.config, adapter=AdapterConfig())
        state = replace(self.state, base="", base_fingerprint="")
        write_model(Path(folder), self.model, self.tokenizer, config, state)
