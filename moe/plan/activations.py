"""Bytes that one micro-batch saves for its backward pass, and that a layer's backward pass needs in addition.

The formulas count the tensors that the code of moe/model, moe/sparse and moe/kernels saves. Change them together;
tests/unit/plan/test_memory.py compares them with what autograd really saves.

Legend: T tokens of the micro-batch, S sequence, H hidden, F feed-forward, N query heads, G key/value heads, D head
dimension, E experts, k choices per token, R = T·k rows of this rank's tokens, M rows that its experts receive,
V vocabulary; s bytes of an activation (2 in bfloat16, 4 in float32).
"""

from __future__ import annotations

import math

from moe.config import AttentionBackend, Config, ExpertBackend, Mlp, QkNorm, Recompute
from moe.kernels.attention.block import BAND_BLOCKS, LONGEST_IN_BLOCKS, MAX_BAND_BLOCK, MIN_BAND_BLOCK, causal_block
from moe.kernels.cross_entropy import slice_rows
from moe.kernels.grouped_lora import ALIGNED
from moe.plan.gradients import MemoryBlock, element_size
from moe.plan.trained import MOST_LAYERS


class Shapes:
    """The sizes that all formulas use. `imbalance`: rows of the rank (or expert) with most, divided by the mean."""

    def __init__(self, config: Config, device: str, imbalance: float) -> None:
        model, router, train = config.model, config.router, config.train
        self.config, self.cuda = config, device == "cuda"
        self.s = element_size(config)
        self.tokens = train.micro_batch_size * train.sequence_length
        self.layers = model.num_hidden_layers
        self.sparse_layers = len(model.sparse_layer_numbers)
        self.hidden, self.vocab = model.hidden_size, model.vocab_size
        self.feed, self.dense_feed, self.shared_feed = model.expert_size, model.intermediate_size, model.shared_size
        self.queries = model.num_attention_heads * model.head_size
        self.keys = model.num_key_value_heads * model.head_size
        self.sparse = model.mlp is Mlp.sparse
        self.top_k = router.most_choices_in(model.sparse_layer_numbers)
        self.rows = self.tokens * self.top_k
        expert = config.parallel.expert_parallel_size
        self.received = math.ceil(self.rows * min(imbalance, expert)) if expert > 1 else self.rows
        self.local = router.num_experts // expert if self.sparse else 1
        self.fullest = min(self.received, math.ceil(self.received / self.local * imbalance))
        # gradients of a layer's experts' weights that a chunk's backward pass adds to those of the chunks before it
        summed = self.sparse and expert > 1 and config.experts.exchanges > 1 and not config.adapter.trains_adapter
        self.routers = 2 if expert > 1 and config.experts.two_batch_overlap else 1  # passes through a layer's router
        self.summed_weights = 3 * self.local * self.feed * self.hidden * self.s if summed else 0
        backend = config.experts.backend
        # on CUDA `auto` with float32 is the loop unless another is measured faster, which needs less
        # (moe/kernels/expert_backends.py)
        self.loop = backend is ExpertBackend.loop or (backend is ExpertBackend.auto and self.cuda and self.s == 4)
        self.fp8, self.expert_rank = config.experts.fp8, _expert_rank(config)
        # on one rank the experts' input isn't kept, and in bfloat16 not their output (moe.kernels.permute.Combination)
        megablocks = backend is ExpertBackend.megablocks
        self.regathers = not (expert > 1 or self.loop or self.expert_rank or megablocks)
        self.combines = self.regathers and self.s == 2 and not self.fp8

    @property
    def stream(self) -> int:
        """Bytes of the residual stream, [T, H]."""
        return self.tokens * self.hidden * self.s


def _expert_rank(config: Config) -> int:
    """The highest rank of adapters on experts, rounded up as `LowRank.pair` has it; 0 without them."""
    adapter = config.adapter
    if not adapter.trains_adapter:
        return 0
    names = (f"model.layers.{layer}.mlp.experts" for layer in config.model.sparse_layer_numbers[:MOST_LAYERS])
    ranks = (adapter.rank_of(name) for name in names if adapter.adapts(name))
    return -(-max(ranks, default=0) // ALIGNED) * ALIGNED


def _attention(shapes: Shapes) -> int:
    """q, k, v and the output as the attention back-end saves them, without the block's input."""
    model, train, s = shapes.config.model, shapes.config.train, shapes.s
    queries, keys, length, window = shapes.queries, shapes.keys, train.sequence_length, model.sliding_window
    log_sum_exp = 4 * model.num_attention_heads
    if model.attention is AttentionBackend.naive:  # all scores in float32: softmax's output twice (and the mask)
        scores = model.num_attention_heads * length * 4
        return shapes.tokens * (2 * scores + (3 * queries + 3 * keys) * s + 8 * queries)
    if shapes.cuda and s == 2:  # varlen: q, k, v made contiguous
        return shapes.tokens * ((2 * queries + 2 * keys) * s + log_sum_exp)
    if window is not None and window < length and not shapes.cuda:  # banded: each block copies its keys
        block = min(max(-(-window // BAND_BLOCKS // 8) * 8, MIN_BAND_BLOCK), MAX_BAND_BLOCK)
        back = -(-(window - 1) // block)
        blocks = -(-length // block)
        whole = max(0, blocks - back)  # blocks that have all `back` blocks before them: their queries are copied too
        first = min(back, blocks)
        copies = (first * (first + 1) / 2 + whole * (back + 1)) / blocks  # times each key is copied
        width = (3 + whole / blocks) * queries + 2 * (copies + 1) * keys
        return round(shapes.tokens * (blocks * block / length * width * s + log_sum_exp))
    width = (queries + 2 * keys) + queries
    if _causal_mask(shapes):
        width += queries  # the blocks' outputs, and their concatenation
    return shapes.tokens * (width * s + log_sum_exp)


def _causal_mask(shapes: Shapes) -> int:
    """The float32 mask that all layers share; 0 where attention takes no blocks of queries, or a window's."""
    model, length = shapes.config.model, shapes.config.train.sequence_length
    window, shared = model.sliding_window, model.num_attention_heads // model.num_key_value_heads
    block = causal_block(shared)
    if shapes.cuda or model.attention is AttentionBackend.naive or (window is not None and window < length):
        return 0
    return 4 * shared * block * (length + block) if block < length <= LONGEST_IN_BLOCKS else 0


def _qk_norm(shapes: Shapes) -> int:
    """What norms of queries and keys keep besides: their input and a root mean square each."""
    model = shapes.config.model
    if model.qk_norm is QkNorm.none:
        return 0
    norms = model.num_attention_heads + model.num_key_value_heads if model.qk_norm is QkNorm.head else 2
    return shapes.tokens * (4 * norms + (shapes.queries + shapes.keys) * shapes.s)


def kept_by_layers(shapes: Shapes, layers: int) -> list[MemoryBlock]:
    """What `layers` layers keep from the forward to the backward pass, under `model.recompute`."""
    sparse = min(layers, shapes.sparse_layers)
    kept = [
        (count, _layer(shapes, shapes.config.model.recompute, is_sparse))
        for count, is_sparse in ((sparse, True), (layers - sparse, False))
    ]
    others, rows = (sum(count * sizes[part] for count, sizes in kept) for part in (0, 1))
    mask = _causal_mask(shapes)
    blocks = _layer_blocks(shapes, others, rows, ("activations", "moe_buffers"))
    return [*blocks, MemoryBlock("activations", mask, mask)] if mask else blocks


def layer_backward(shapes: Shapes) -> list[MemoryBlock]:
    """What a layer's backward pass holds besides the kept activations and its weights' gradients. With recomputation
    that includes the recomputed activations."""
    dense, rows = _layer(shapes, Recompute.none, shapes.sparse)
    kept_dense, kept_rows = _layer(shapes, shapes.config.model.recompute, shapes.sparse)
    returned = _layer_blocks(shapes, dense - kept_dense, rows - kept_rows, ("recomputed", "recomputed"))
    return [*returned, MemoryBlock("working", _backward(shapes), shapes.stream)]


def _layer_blocks(shapes: Shapes, dense: int, rows: int, kinds: tuple[str, str]) -> list[MemoryBlock]:
    """Blocks of `dense` bytes and of `rows` bytes, the latter split into the gate/up tensor and the experts' inputs and
    outputs, where they are kept, whose largest tensors differ in size."""
    gate_up = shapes.received * 2 * shapes.feed * shapes.s
    middle = (
        rows
        * 2
        * shapes.feed
        // (2 * shapes.feed + (0 if shapes.combines else 1 if shapes.regathers else 2) * shapes.hidden)
    )
    return [
        MemoryBlock(kinds[0], dense, shapes.stream),
        MemoryBlock(kinds[1], middle, gate_up),
        MemoryBlock(kinds[1], rows - middle, shapes.received * shapes.hidden * shapes.s),
    ]


def _layer(shapes: Shapes, recompute: Recompute, sparse: bool) -> tuple[int, int]:
    """(bytes of everything but rows, bytes of the experts' rows) that one layer keeps."""
    tokens, hidden, feed, s = shapes.tokens, shapes.hidden, shapes.feed, shapes.s
    # the block's input, before and after the norm
    attention = 2 * shapes.stream + 4 * tokens + _attention(shapes) + _qk_norm(shapes)
    if sparse:
        experts, top_k = shapes.config.router.num_experts, shapes.top_k
        routing = tokens * (8 * experts + 12 * top_k)  # logits, probabilities, ids, weights: returned, so always kept
        index = 24 * shapes.rows + (16 * shapes.received if shapes.config.parallel.expert_parallel_size > 1 else 0)
        # the router keeps its input: as it came, or in float32 with noise
        widened = s == 4 or bool(getattr(shapes.config.router, "jitter_noise", 0.0))
        mlp = shapes.routers * 4 * tokens * hidden if widened else shapes.stream
        mlp += shapes.routers * tokens * 4 * (experts + 3 * top_k) + index
        mlp += 3 * tokens * shapes.shared_feed * s
        middle = (4 if shapes.loop else 2) * feed
        if shapes.expert_rank:  # the activation, and what both A make
            middle = 3 * feed + 2 * shapes.expert_rank
        rows = shapes.received * middle * s
        rows += 0 if shapes.combines else shapes.rows * hidden * s
        if shapes.regathers:
            mlp += shapes.stream if s < 4 and widened else 0  # else it is the router's input
        else:
            rows += shapes.received * hidden * s
    else:
        routing, rows = 0, 0
        mlp = shapes.stream + 3 * tokens * shapes.dense_feed * s
    if recompute is Recompute.block:
        return shapes.stream + routing, 0
    if recompute is Recompute.mlp:
        return attention + shapes.stream + routing, 0
    return attention + shapes.stream + 4 * tokens + routing + mlp, rows


def _backward(shapes: Shapes) -> int:
    """The most that one layer's backward pass holds at once: in the MLP or in attention."""
    tokens, s = shapes.tokens, shapes.s
    attention = 2 * tokens * (shapes.queries + 2 * shapes.keys) * s + shapes.stream
    if not shapes.sparse:
        return shapes.stream + max(attention, 4 * tokens * shapes.dense_feed * s)
    row = shapes.hidden * s
    if shapes.combines:
        # experts: copies of the tokens and of their gradient (on a CPU of one expert), and the gradient of the former
        combine = 0
        experts = (shapes.rows if shapes.cuda else 2 * shapes.fullest + shapes.rows) * row
    else:
        # combine: each choice's gradient row; in plain PyTorch also its product with the expert's output, in float32
        combine = shapes.rows * shapes.hidden * (s if shapes.cuda else 8 if s == 4 else 10)
        # experts: gradients of their output and input, less the output, which is freed by then; their input again, on a
        # CPU of one expert
        again = 0 if not shapes.regathers else shapes.rows if shapes.cuda else shapes.fullest
        experts = (2 * shapes.received - shapes.rows + again) * row
    if shapes.cuda and not shapes.loop:
        # all rows at once: the gradients of the activation, which it overwrites, and gate/up
        experts += 3 * shapes.received * shapes.feed * s
        if shapes.fp8:  # both factors of a product
            experts += 2 * shapes.feed * (shapes.received + shapes.local * shapes.hidden)
    elif shapes.loop:
        experts += 5 * shapes.received * shapes.feed * s
    else:  # one expert after the other
        experts += (16 if s == 4 else 30) * shapes.fullest * shapes.feed
        if shapes.fp8:  # both factors of a product: one as it is, the other in float8 and twice in float32
            experts += 9 * 2 * shapes.feed * (shapes.fullest + shapes.hidden)
    experts += shapes.summed_weights
    return shapes.stream + max(combine, experts, attention)


def head_memory(shapes: Shapes) -> tuple[int, int]:
    """(kept, working) bytes of the last norm and the loss, which computes its gradients in the forward pass."""
    weight = 4 * shapes.vocab * shapes.hidden
    kept = 2 * shapes.stream + weight  # the last norm's input, and both gradients
    rows = min(shapes.tokens, slice_rows("cuda" if shapes.cuda else "cpu", shapes.vocab))
    slice_bytes = rows * shapes.vocab * (4 if shapes.s == 4 else 2 if shapes.cuda else 8)  # plain PyTorch widens them
    scaled = shapes.stream + weight + (weight // 2 if shapes.s == 2 else 0)
    return kept, max(slice_bytes, scaled)


def evaluation_memory(shapes: Shapes) -> int:
    """Bytes of a whole micro-batch's logits, and of one sequence's in float32 with its log-softmax."""
    length = shapes.config.train.sequence_length
    return shapes.vocab * (shapes.tokens * shapes.s + length * (4 + (4 if shapes.s == 2 else 0)))
