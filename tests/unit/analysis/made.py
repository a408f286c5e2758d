"""Texts, choices and models made by hand for the tests of moe/analysis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe.analysis.observe import LayerChoices, Observed
from moe.analysis.text import TextSequence
from moe.config import (
    DataConfig,
    ExpertsConfig,
    Initializer,
    ModelConfig,
    TokenizerConfig,
    TokenizerKind,
    TopKRouterConfig,
)
from moe.data.corpus import Corpus
from moe.data.packing import NO_TARGET
from moe.data.prepare import prepare
from moe.model.mlp import DenseMLP
from moe.model.transformer import Transformer
from moe.sparse import Randomness, build_sparse_mlp
from moe.sparse.routers.base import Choices, Router, RouterOutput, count_choices

VOCABULARY = 320


def choices(experts: list[list[int]], num_experts: int, layer: int = 0) -> LayerChoices:
    """`experts` of each token, best first; weights fall from the first on."""
    tokens_N = np.repeat(np.arange(len(experts)), [len(own) for own in experts])
    flat = [(expert, 1 / (place + 1)) for own in experts for place, expert in enumerate(own)]
    experts_N = np.array([expert for expert, _ in flat], np.int64)
    weights_N = np.array([weight for _, weight in flat], np.float32)
    return LayerChoices(layer, num_experts, tokens_N, experts_N, weights_N, len(experts))


def observed(
    *layers: LayerChoices, sequences: list[int], sources: list[int], pieces: list[int] | None = None, ids=None
) -> Observed:
    """`sequences` and `pieces` (default: the sequences) of each token, `sources` of each sequence; loss 1 a token."""
    sequences_T, sources_B = np.array(sequences), np.array(sources)
    pieces_T = np.array(sequences if pieces is None else pieces)
    starts = np.flatnonzero(np.diff(pieces_T, prepend=-1))
    targets_B = np.bincount(sequences_T)
    return Observed(
        ids_T=np.arange(len(sequences_T)) if ids is None else np.array(ids),
        sequences_T=sequences_T,
        pieces_T=pieces_T,
        positions_T=np.arange(len(pieces_T)) - starts[pieces_T],
        sources_T=sources_B[sequences_T],
        sources_B=sources_B,
        source_names=[f"s{source}" for source in range(int(sources_B.max()) + 1)],
        layers=list(layers),
        nats_B=targets_B.astype(float),
        targets_B=targets_B,
    )


def text(count: int, length: int = 12, sources: int = 2, vocabulary: int = VOCABULARY) -> list[TextSequence]:
    """Random sequences, each of two documents."""
    random = np.random.default_rng(0)
    found = []
    for index in range(count):
        ids_L = random.integers(0, vocabulary, length)
        labels_L = np.append(ids_L[1:], ids_L[0])
        labels_L[length // 2 - 1] = NO_TARGET
        documents_L = (np.arange(length) >= length // 2).astype(np.int32)
        found.append(TextSequence(index % sources, ids_L, labels_L, documents_L))
    return found


class RaggedRouter(Router):
    """Token number t of a sequence goes to the first t mod (E + 1) experts, with weight 1 each: from none to all."""

    def __init__(self, num_experts: int) -> None:
        super().__init__(1, TopKRouterConfig(num_experts=num_experts))

    def forward(self, x_BSH: Tensor, randomness: Randomness | None = None) -> RouterOutput:
        experts = self.config.num_experts
        batch, length, _ = x_BSH.shape
        sizes_T = (torch.arange(length) % (experts + 1)).repeat(batch)
        tokens_N = torch.arange(batch * length).repeat_interleave(sizes_T)
        experts_N = torch.cat([torch.arange(int(size)) for size in sizes_T])
        logits_TE = torch.zeros(batch * length, experts)
        chosen = Choices(tokens_N, experts_N, torch.ones(len(tokens_N)), batch * length)
        counts_E = count_choices(experts_N, experts)
        return RouterOutput(chosen, logits_TE, logits_TE.softmax(-1), counts_E, {}, {})


def model(layers: int = 2, experts: int = 4, top_k: int = 2) -> Transformer:
    """A sparse model in eval mode, with weights larger than usual."""
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer=Initializer.normal,
        initializer_range=0.3,
    )
    made = Transformer(config, TopKRouterConfig(num_experts=experts, top_k=top_k), ExpertsConfig())
    made.init_weights(0)
    return made.eval()


def uneven_model() -> Transformer:
    """Four layers: dense; ragged choices of 4 experts; top 3 of 6; top 1 of 2."""
    made = model(layers=4, experts=4)
    blocks = list(made.model.layers)
    blocks[0].mlp = DenseMLP(16, 24)
    blocks[1].mlp.gate = RaggedRouter(4)
    for block, experts, top_k in ((blocks[2], 6, 3), (blocks[3], 2, 1)):
        router = TopKRouterConfig(num_experts=experts, top_k=top_k, norm_topk_prob=top_k > 1)
        block.mlp = build_sparse_mlp(16, 24, router, ExpertsConfig())
    return made.eval()


def corpus(folder: Path) -> Corpus:
    """Two sources, sums and words, with a tokenizer trained on them. Words have markup and control characters."""
    for name, lines in (
        ("sums", [f"{a} plus {b} makes {a + b}.\n" for a in range(40) for b in range(20)]),
        ("words", [f"<b>the {one}</b> of a {other} & \x07 \u00e4\n" for one in "abcdefghij" for other in "klmnopqrst"]),
    ):
        (folder / name).mkdir()
        for part in range(10):
            (folder / name / f"{part}.txt").write_text("".join(lines[part::10]))
    sources = {name: {"path": str(folder / name)} for name in ("sums", "words")}
    data = DataConfig(sources=sources, held_out=0.3, cache_dir=str(folder / "cache"))
    tokenizer = TokenizerConfig(kind=TokenizerKind.sentencepiece, vocab_size=VOCABULARY)
    return prepare(data, tokenizer, log=lambda _: None)
