"""`moe bench decode`: text generation on a CPU beside transformers' `generate`, in one process.

    moe bench decode                                       # configs/model/small.yaml: one prompt, then 32 prompts
    moe bench decode rounds=9 steps=128                    # 128 new tokens for each prompt
    moe bench decode train.sequence_length=512             # prompts of 512 tokens; any other key of `moe train`

Both sides have the same weights, prompts and threads, and take the most probable token. Their tokens must be the same
(see `same_tokens`) before anything is timed. Ours runs what `moe generate` runs, text pieces included; the peer uses
its fastest experts implementation, found by timing them here. Rounds alternate which side goes first, and a ratio is
computed within each round. Times include the prompt; `first token` is the time of the prompt alone. With one thread
they are CPU time, which other programs on the machine disturb less than wall-clock.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe.bench.clock import conditions, now
from moe.bench.peer import IMPLEMENTATIONS, copied_too_large, peer_model, require_transformers
from moe.bench.peers import parse
from moe.bench.results import Cell, Results, ResultTable
from moe.bench.settings import Rounds, counted, spread
from moe.config import Config, Precision
from moe.config.generate import Sampling
from moe.errors import UserError
from moe.inference.generate import stream
from moe.inference.lean_decoder import obstacle, open_decoder
from moe.model.build import build_model
from moe.model.cache import KVCache
from moe.model.transformer import Transformer
from moe.sparse.balance import max_violation
from moe.sparse.routers.base import count_choices

DEFAULTS = ["train.sequence_length=32"]
BATCHES = (1, 32)  # prompts
COLUMNS = ["side", "tokens/s", "ms/step", "first token, ms", "operations a step", "MaxVio"]
HOPELESS = 5  # an implementation's first token takes so many times as long as that of another
FIRST = 0x4E00  # the characters that stand for token ids: whole, printing ones, so that each is a piece of text
MOST_IDS = 0xD800 - FIRST

ROUNDED = 1e-5  # of the largest logit

Generate = Callable[[Tensor, int], Tensor]  # prompts [B, P], number of new tokens → new tokens [B, N]


@dataclass(frozen=True, slots=True)
class Generated:
    """Seconds of both sides for one batch of prompts: to the last token, and to the first."""

    ours: float
    peer: float
    our_first: float
    peer_first: float


class CharacterPerToken:
    """A tokenizer whose text says which tokens it was made of. No token ends a text."""

    chat_template = None
    fingerprint = "bench"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.bos_id, self.eos_id = vocab_size, 0, -1

    def encode(self, text: str) -> list[int]:
        return [ord(character) - FIRST for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join([chr(FIRST + token) for token in ids])


class Operations(TorchDispatchMode):
    """Counts torch's operations, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def run(overrides: list[str]) -> Results:
    """Both sides' times for each batch; the last line is `ratio tokens/s N.NN`, of one prompt. Raises UserError."""
    keys, config = parse([*DEFAULTS, *overrides], Rounds(rounds=7, steps=64))
    if config.train.precision is not Precision.float32:
        raise UserError(f"train.precision={config.train.precision.value} must be float32: both sides generate in it")
    require_transformers("decode")
    if config.model.vocab_size > MOST_IDS:
        raise UserError(f"model.vocab_size={config.model.vocab_size} must be ≤ {MOST_IDS}: a character for each token")
    ours = build_model(config, torch.device("cpu")).eval()
    against = obstacle(ours)
    if against is not None:
        raise UserError(f"bench decode: {against}, so it is decoded by the model's own forward pass")
    peer = peer_model(config).eval()
    peer.load_state_dict(ours.state_dict())
    peer.config.update({"use_cache": True, "output_router_logits": False})
    table, notes, figures = ResultTable(["prompts", *COLUMNS], []), list[str](), dict[str, float]()
    for batch in reversed(BATCHES):
        prompts_BP = _prompts(config, batch)
        implementation = best_implementation(peer, prompts_BP, keys.steps, config)
        same_tokens(ours, peer, prompts_BP, keys.steps)
        operations = our_operations(ours, prompts_BP), peer_operations(peer, prompts_BP)
        rounds = list(measure(keys, {"ours": our_tokens(ours), "peer": peer_tokens(peer)}, prompts_BP))
        violation = routing_violation(ours, prompts_BP, keys.steps)
        rows, note, ratio = summary(rounds, batch, keys.steps, implementation, operations, violation)
        table.rows += [[batch, *row] for row in rows]
        notes.append(note)
        figures["ratio tokens/s {}" if batch == BATCHES[0] else f"ratio tokens/s, {batch} prompts: {{}}"] = ratio
    return Results([table], [*notes, conditions()], figures)


def our_tokens(model: Transformer) -> Generate:
    """What `moe generate` runs, from token ids to text, and back to the ids."""
    tokenizer: Any = CharacterPerToken(model.config.vocab_size)

    def generate(prompts_BP: Tensor, count: int) -> Tensor:
        texts = [""] * len(prompts_BP)
        settings = Sampling(max_new_tokens=count, temperature=0.0)
        for piece in stream(model, tokenizer, prompts_BP.tolist(), settings):
            texts[piece.prompt] += piece.text
        return torch.tensor([tokenizer.encode(text) for text in texts])

    return generate


def peer_tokens(peer: Any) -> Generate:
    from transformers import GenerationConfig

    def generate(prompts_BP: Tensor, count: int) -> Tensor:
        settings = GenerationConfig(
            max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        whole = peer.generate(prompts_BP, attention_mask=torch.ones_like(prompts_BP), generation_config=settings)
        return whole[:, prompts_BP.shape[1] :]

    return generate


@torch.no_grad()
def same_tokens(ours: Transformer, peer: Any, prompts_BP: Tensor, count: int) -> None:
    """Raises RuntimeError unless both sides generate the same tokens: a ratio of different texts would mean nothing.

    Rounding may make the peer choose another of two nearly equal experts or tokens. Texts may therefore part where the
    whole passes of both models over what they share agree to `ROUNDED`, and our token is the most probable one there.
    """
    mine_BN, theirs_BN = our_tokens(ours)(prompts_BP, count), peer_tokens(peer)(prompts_BP, count)
    compared, parted = mine_BN.numel(), 0
    for prompt in (mine_BN != theirs_BN).any(1).nonzero().flatten().tolist():
        token = int((mine_BN[prompt] != theirs_BN[prompt]).nonzero()[0])
        shared_1S = torch.cat((prompts_BP[prompt], mine_BN[prompt, :token]))[None]
        logits_V, theirs_V = _whole_pass(ours, shared_1S), peer(shared_1S, logits_to_keep=1).logits[0, -1]
        allowed = ROUNDED * float(logits_V.abs().max())
        gap, short = float((logits_V - theirs_V).abs().max()), float(logits_V.max() - logits_V[mine_BN[prompt, token]])
        if not max(gap, short) <= allowed:
            raise RuntimeError(
                f"the two sides generate different tokens, first in prompt {prompt} at token {token}: their logits "
                f"differ by {gap:.1e}, and ours is {short:.1e} below the largest"
            )
        compared, parted = compared - (count - token), parted + 1
    apart = f"; {parted} of the texts part where the peer's rounding changes a choice" if parted else ""
    print(f"prompts: {len(prompts_BP)}; both sides generate the same {compared} tokens{apart}")


def _whole_pass(model: Transformer, ids_1S: Tensor) -> Tensor:
    """The logits [V] that follow a text, by the model's own pass."""
    logits_BSV = model(ids_1S, logits_to_keep=1).logits_BSV
    assert logits_BSV is not None
    return logits_BSV[0, -1]


@torch.no_grad()
def routing_violation(ours: Transformer, prompts_BP: Tensor, count: int) -> float:
    """MaxVio of the generated tokens that a decoder takes in (the last isn't), mean over layers, by a whole pass over
    our texts. Both sides have it: they choose the same experts."""
    texts_BS = torch.cat((prompts_BP, our_tokens(ours)(prompts_BP, count)[:, :-1]), 1)
    counts = []
    for router in ours(texts_BS, logits_to_keep=1).routers:
        experts_BSK = router.choices.experts_N.view(*texts_BS.shape, -1)
        counts.append(count_choices(experts_BSK[:, prompts_BP.shape[1] :].flatten(), len(router.counts_E)))
    return float(max_violation(torch.stack(counts)).mean())


def best_implementation(peer: Any, prompts_BP: Tensor, count: int, config: Config) -> str:
    """Times each of the peer's experts implementations for `count` tokens, and sets and returns the fastest."""
    seconds: dict[str, float] = {}
    firsts: list[float] = []
    for name in IMPLEMENTATIONS:
        reason = copied_too_large(config, prompts_BP.numel(), layers=1) if name == "batched_mm" else None
        if reason is not None:
            print(f"peer's experts, {name}: left out, {reason}")
            continue
        peer.set_experts_implementation(name)
        generate = peer_tokens(peer)
        firsts.append(_seconds(generate, prompts_BP, 1))
        if firsts[-1] > HOPELESS * min(firsts):
            print(f"peer's experts, {name}: left out, the first token alone takes {firsts[-1]:.1f} s")
            continue
        seconds[name] = _seconds(generate, prompts_BP, count)
        print(f"peer's experts, {name}: {seconds[name] / count * 1e3:,.1f} ms/step", flush=True)
    best = min(seconds, key=lambda name: seconds[name])
    peer.set_experts_implementation(best)
    return best


def our_operations(model: Transformer, prompts_BP: Tensor) -> int:
    """Operations of one decoded token of each prompt."""
    batch, width = prompts_BP.shape
    decoder = open_decoder(model, KVCache(model.config, batch, width + 2, model.device, model.dtype))
    decoder.prefill(prompts_BP.tolist(), 512, 0)
    decoder.step([0] * len(prompts_BP))  # the first one may compute the rotary table
    with Operations() as operations:
        decoder.step([0] * len(prompts_BP))
    return operations.count


@torch.no_grad()
def peer_operations(peer: Any, prompts_BP: Tensor) -> int:
    """The same of the peer's forward pass, without what its `generate` adds."""
    cache = peer(prompts_BP, use_cache=True).past_key_values
    with warnings.catch_warnings(), Operations() as operations:
        warnings.simplefilter("ignore", FutureWarning)  # of a keyword's new name
        peer(prompts_BP[:, :1], past_key_values=cache, use_cache=True)
    return operations.count


def measure(keys: Rounds, sides: dict[str, Generate], prompts_BP: Tensor) -> Iterator[Generated]:
    """Alternating rounds of both sides."""
    for index in range(keys.rounds):
        whole, first = {}, {}
        for name in sorted(sides, reverse=bool(index % 2)):
            first[name] = _seconds(sides[name], prompts_BP, 1)
            whole[name] = _seconds(sides[name], prompts_BP, keys.steps)
        yield Generated(whole["ours"], whole["peer"], first["ours"], first["peer"])


def summary(
    rounds: list[Generated],
    batch: int,
    steps: int,
    implementation: str,
    operations: tuple[int, int],
    violation: float,
) -> tuple[list[list[Cell]], str, float]:
    """A row of `COLUMNS` for each side, a note, and the median of the rounds' ratios of tokens per second."""
    ratios = [each.peer / each.ours for each in rounds]
    firsts = [each.peer_first / each.our_first for each in rounds]
    rows: list[list[Cell]] = []
    names = "ours", f"transformers, {implementation}"
    for name, side, count in zip(names, ("ours", "peer"), operations, strict=True):
        seconds = statistics.median(getattr(each, side) for each in rounds)
        first = statistics.median(getattr(each, side.removesuffix("s") + "_first") for each in rounds)
        rows.append([name, batch * steps / seconds, seconds / steps * 1e3, first * 1e3, count, violation])
    note = (
        f"{counted(batch, 'prompt')}: medians of {counted(len(rounds), 'alternating round')} of {steps} tokens; "
        f"first token {statistics.median(firsts):.2f} × as fast; ratio per round {spread(ratios)}"
    )
    return rows, note, statistics.median(ratios)


def _prompts(config: Config, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(config.train.seed)
    return torch.randint(config.model.vocab_size, (batch, config.train.sequence_length), generator=generator)


def _seconds(generate: Generate, prompts_BP: Tensor, count: int) -> float:
    start = now()
    generate(prompts_BP, count)
    return now() - start
